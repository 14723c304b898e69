"""Quantizing a small checkpoint: what is written, what it costs, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import huoyan
from huoyan.cli.quantize import summary
from huoyan.errors import HuoyanError, InputError, MediaError, ModelError
from huoyan.layers.int4 import Int4Linear, Int4Weight
from huoyan.layers.int8 import Int8Embedding, Int8Linear
from huoyan.layers.rope import RotaryTable
from huoyan.media.picture import Picture
from huoyan.models.checkpoint import open_checkpoint
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.tensor_reader import TensorReader
from huoyan.models.weights import load_model
from huoyan.quantize import awq as awq_module
from huoyan.quantize import compensate as compensate_module
from huoyan.quantize import run as run_module
from huoyan.quantize.awq import SHRINKS, LayerInputs, best_shrink, scale_helps
from huoyan.quantize.calibration import SHARES, CalibrationItem, EncodedItem, read_calibration, token_weights
from huoyan.quantize.compensate import compensated_error, damp_, fit_scales, gram, round_compensated
from huoyan.quantize.rounding import fake_quantize, round_to_int4
from huoyan.quantize.run import quantize
from tests.models.small import small_model, write_checkpoint
from tests.models.test_forward import causal
from tests.prompt.checkpoint import train, write_folder

CHANGES = {"intermediate_size": 512, "query_num": 64, "vocab_size": 2000}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "model"
    tokenizer = train()
    model = small_model(5, **CHANGES)
    with torch.no_grad():
        # Some inputs much larger than others: what activation-aware scaling is for.
        for layer in model.llm.model.layers:
            channels = torch.exp(0.6 * torch.randn(256, generator=torch.Generator().manual_seed(3)))
            layer.input_layernorm.weight.mul_(channels)
            layer.post_attention_layernorm.weight.mul_(channels)
    folder.mkdir()
    write_folder(folder, tokenizer)
    write_checkpoint(folder, model, **CHANGES)
    return folder


@pytest.fixture(scope="module")
def items() -> list[CalibrationItem]:
    rng = np.random.default_rng(0)

    def picture() -> Picture:
        return Picture(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))

    return [
        CalibrationItem(q, (picture(),), a)
        for q, a in [
            ("what?", "a tree and a red house"),
            ("颜色", "红色和蓝色"),
            ("hello", "good day to you"),
            ("数", "三个"),
        ]
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def results(
    source: Path, items: list[CalibrationItem], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, run_module.QuantizeReport]:
    folder = tmp_path_factory.mktemp("results")
    return {
        method: quantize(
            source, folder / method, method=method, group_size=64, calibration=items, device="cpu"
        )
        for method in ("awq", "rtn")
    }


def logits(model: MiniCPMV, seed: int) -> Tensor:
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(seed))
    return model.logits(model.decoder(model.embed(ids), torch.arange(40), causal))


def test_the_result_is_a_checkpoint_near_the_original(
    source: Path, results: dict[str, run_module.QuantizeReport], seed: int
) -> None:
    expected = logits(load_model(open_checkpoint(source)), seed)
    errors = {}
    for method, report in results.items():
        checkpoint = open_checkpoint(report.folder)
        model = load_model(checkpoint, dtype="float32")
        assert sum(isinstance(m, Int4Linear) for m in model.modules()) == 4 * 2
        errors[method] = float((logits(model, seed) - expected).norm() / expected.norm())
        assert report.bytes_after < report.bytes_before
        files = {file.name for file in report.folder.iterdir()}
        assert {"tokenizer.json", "preprocessor_config.json", "quantization_report.json"} <= files
        assert not any("partial" in name or "tmp" in name or name == "quantize.json" for name in files)
    assert errors["rtn"] < 0.5
    assert errors["awq"] < 0.5


def test_awq_costs_less_than_rounding(results: dict[str, run_module.QuantizeReport]) -> None:
    awq, rtn = results["awq"], results["rtn"]
    assert all(a["relative_error"] < r["relative_error"] for a, r in zip(awq.layers, rtn.layers, strict=True))
    assert awq.perplexity_before == pytest.approx(rtn.perplexity_before)
    assert 0 <= awq.agreement <= 1


def test_published_names(results: dict[str, run_module.QuantizeReport]) -> None:
    tensors = open_checkpoint(results["awq"].folder).tensors
    q = tensors["llm.model.layers.1.mlp.down_proj.qweight"]
    assert (q.dtype, q.shape) == ("I32", (512, 256 // 8))
    assert tensors["llm.model.layers.1.mlp.down_proj.qzeros"].shape == (512 // 64, 256 // 8)
    assert tensors["llm.model.layers.1.mlp.down_proj.scales"].shape == (512 // 64, 256)
    assert tensors["llm.model.layers.0.self_attn.q_proj.bias"].dtype == "F16"
    assert tensors["llm.lm_head.weight"].dtype == "F16"
    config = json.loads((results["awq"].folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert config["torch_dtype"] == "float16"


def test_an_interrupted_run_goes_on(
    source: Path,
    items: list[CalibrationItem],
    results: dict[str, run_module.QuantizeReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        quantize(source, tmp_path / "out", group_size=64, calibration=items, device="cpu", step=stop)
    assert not (tmp_path / "out").exists()
    quantized: list[int] = []
    original = run_module.quantize_layer
    monkeypatch.setattr(run_module, "quantize_layer", lambda *a: (quantized.append(1), original(*a))[1])
    report = quantize(source, tmp_path / "out", group_size=64, calibration=items, device="cpu")
    assert len(quantized) == 1
    for name, info in open_checkpoint(results["awq"].folder).tensors.items():
        assert info.shape == open_checkpoint(report.folder).tensors[name].shape
    for file in sorted(report.folder.glob("*.safetensors")):
        assert file.read_bytes() == (results["awq"].folder / file.name).read_bytes()


def test_a_full_disk_is_one_line_and_loses_nothing(
    source: Path, items: list[CalibrationItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace
    calls = []

    def full(a: Path, b: Path) -> None:
        if str(b).endswith("layer-00001.safetensors"):
            calls.append(b)
            raise OSError(28, "No space left on device")
        real(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(HuoyanError, match="No space left") as caught:
        quantize(source, tmp_path / "out", group_size=64, calibration=items, device="cpu")
    assert calls
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    quantize(source, tmp_path / "out", group_size=64, calibration=items, device="cpu")
    open_checkpoint(tmp_path / "out")


def test_refusals(source: Path, results: dict[str, run_module.QuantizeReport], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bits"):
        quantize(source, tmp_path / "a", bits=3)
    with pytest.raises(InputError, match="group size"):
        quantize(source, tmp_path / "a", group_size=100)
    with pytest.raises(InputError, match="method"):
        quantize(source, tmp_path / "a", method="magic")
    with pytest.raises(ModelError, match="already"):
        quantize(results["awq"].folder, tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="exists already"):
        quantize(source, tmp_path / "full", calibration=[CalibrationItem("hi")], device="cpu")


def test_calibration_files(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with pytest.raises(InputError, match="no pictures"):
        read_calibration(pictures)
    Picture(np.zeros((20, 30, 3), np.uint8)).to_pil().save(pictures / "a.png")
    assert [item.pictures[0].size for item in read_calibration(pictures)] == [(30, 20)]
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"question": "q", "image": "pictures/a.png", "answer": "x"}\n\n{"question": "text"}\n')
    read = read_calibration(lines)
    assert [(item.question, len(item.pictures), item.answer) for item in read] == [
        ("q", 1, "x"),
        ("text", 0, ""),
    ]
    for bad, word in (("{", "JSON"), ("{}", "question"), ('{"question": "q", "images": 3}', "images")):
        lines.write_text(bad)
        with pytest.raises(InputError, match=word):
            read_calibration(lines)
    lines.write_text('{"question": "q", "image": "gone.png"}')
    with pytest.raises(MediaError, match="line 1"):
        read_calibration(lines)
    with pytest.raises(InputError, match="does not exist"):
        read_calibration(tmp_path / "nothing")


def test_the_builtin_set_is_the_same_every_time() -> None:
    first, second = read_calibration(None), read_calibration(None)
    assert [i.question for i in first] == [i.question for i in second]
    assert [p.digest for i in first for p in i.pictures] == [p.digest for i in second for p in i.pictures]
    assert len(first) >= 40
    assert any(len(i.pictures) == 2 for i in first)
    assert any(not i.pictures for i in first)


def test_leftovers_of_another_run_are_not_mixed_in(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    shutil.copytree(source, partial)
    items = [CalibrationItem("hello", (), "good day")]
    with pytest.raises(InputError, match="in the way"):
        quantize(source, tmp_path / "out", method="rtn", group_size=64, calibration=items, device="cpu")
    assert (partial / "tokenizer.json").exists()
    (partial / "quantize.json").write_text(json.dumps({"made_from": {"method": "other"}, "notes": {}}))
    said: list[str] = []
    report = quantize(
        source, tmp_path / "out", method="rtn", group_size=64, calibration=items, device="cpu",
        note=said.append,
    )  # fmt: skip
    assert "thrown away" in said[0]
    assert not partial.exists()
    assert {f.name for f in report.folder.glob("*.safetensors")} == {
        f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    }


@pytest.mark.parametrize("modules", ["gate_up,down", "qkv", "o,down"])
def test_some_modules_only(
    source: Path, items: list[CalibrationItem], tmp_path: Path, modules: str, seed: int
) -> None:
    report = quantize(
        source, tmp_path / "out", group_size=64, calibration=items[:4], device="cpu", modules=modules
    )
    loaded = load_model(open_checkpoint(report.folder), dtype="float32")
    kinds = {name.rpartition(".")[2] for name, m in loaded.named_modules() if isinstance(m, Int4Linear)}
    assert kinds == {f"{name}_proj" for name in modules.split(",")}
    expected = logits(load_model(open_checkpoint(source)), seed)
    assert float((logits(loaded, seed) - expected).norm() / expected.norm()) < 0.5
    kept = json.loads((report.folder / "config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ]
    assert ("q_proj" in kept) == ("qkv" not in modules)
    assert ("down_proj" in kept) == ("down" not in modules)


def test_what_modules_are_called(source: Path, tmp_path: Path) -> None:
    for bad in ("qkv,attention", "", ()):
        with pytest.raises(InputError, match="module"):
            quantize(source, tmp_path / "a", modules=bad)
    with pytest.raises(InputError, match="device"):
        quantize(source, tmp_path / "a", device="abacus")


def test_a_resumed_run_says_so(source: Path, items: list[CalibrationItem], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        raise Stop

    common = {"method": "rtn", "group_size": 64, "calibration": items, "device": "cpu"}
    with pytest.raises(Stop):
        quantize(source, tmp_path / "out", step=stop, **common)
    said: list[str] = []
    report = quantize(source, tmp_path / "out", note=said.append, **common)
    assert any("1 of 2 layers" in line for line in said)
    assert report.resumed_layers == 1


def test_a_disk_that_fills_at_the_end_is_gone_on_with(
    source: Path, items: list[CalibrationItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    common = {"method": "rtn", "group_size": 64, "calibration": items, "device": "cpu"}
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(HuoyanError, match="No space left"):
        quantize(source, tmp_path / "out", **common)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert quantize(source, tmp_path / "out", **common).resumed_layers == 2
    open_checkpoint(tmp_path / "out")


def test_without_answers_nothing_is_made_up(source: Path, tmp_path: Path) -> None:
    items = [CalibrationItem(f"hello {i}") for i in range(8)]
    report = quantize(source, tmp_path / "out", method="rtn", group_size=64, calibration=items, device="cpu")
    assert report.perplexity_before is report.perplexity_after is report.agreement is None
    written = json.loads((report.folder / "quantization_report.json").read_text())
    assert written["agreement"] is None


def test_the_package_is_the_function(source: Path, items: list[CalibrationItem], tmp_path: Path) -> None:
    report = huoyan.quantize(
        source, tmp_path / "out", method="rtn", group_size=64, calibration=items, device="cpu"
    )
    assert isinstance(report, huoyan.quantize.QuantizeReport)
    assert huoyan.quantize.quantize is quantize


def test_shrinks_against_every_product(seed: int) -> None:
    """The error over all tokens, one group and share at a time."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 64, generator=g)
    weight[:, ::16] *= 6
    x = torch.randn(50, 64, generator=g) * torch.rand(64, generator=g)
    found = best_shrink(weight, x, 32)
    for row in range(12):
        for group in range(2):
            part = slice(32 * group, 32 * group + 32)
            one, seen = weight[row : row + 1, part], x[:, part]
            errors = [
                float(((fake_quantize(one, 32, torch.tensor([[share]])) - one) @ seen.T).square().sum())
                for share in SHRINKS
            ]
            mine = errors[min(range(len(SHRINKS)), key=lambda i: abs(SHRINKS[i] - float(found[row, group])))]
            assert mine <= min(errors) * 1.001


def test_some_sequences_fit_and_are_spread(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (40,), generator=g).tolist()
    inputs = LayerInputs(torch.randn(sum(lengths), 8, generator=g), lengths, RotaryTable(4, 1e4, 64))
    some = inputs.some(300)
    assert sum(some.lengths) == len(some.x) <= 300
    assert sum(some.lengths) > 240
    starts = [float(part[0, 0]) for part in inputs.x.split(lengths)]
    chosen = [starts.index(float(part[0, 0])) for part in some.x.split(some.lengths)]
    assert [lengths[i] for i in chosen] == some.lengths
    assert max(chosen) > 20 > min(chosen)
    assert inputs.some(10**6) is inputs


def test_the_vocabulary_in_eight_bits(
    source: Path,
    items: list[CalibrationItem],
    results: dict[str, run_module.QuantizeReport],
    tmp_path: Path,
    seed: int,
) -> None:
    common = {"method": "rtn", "group_size": 64, "calibration": items, "device": "cpu"}
    report = quantize(source, tmp_path / "out", quantize_head="int8", **common)
    plain = results["rtn"]
    values = 2 * CHANGES["vocab_size"] * 256
    assert plain.bytes_after - report.bytes_after == values - 2 * 4 * CHANGES["vocab_size"]
    assert report.int8_head
    assert not plain.int8_head
    assert report.perplexity_before == plain.perplexity_before
    assert report.perplexity_after == pytest.approx(plain.perplexity_after, rel=0.02)
    assert report.perplexity_after != plain.perplexity_after
    checkpoint = open_checkpoint(report.folder)
    assert checkpoint.tensors["llm.lm_head.weight"].dtype == "I8"
    loaded = load_model(checkpoint, dtype="float32")
    assert isinstance(loaded.llm.lm_head, Int8Linear)
    assert isinstance(loaded.llm.model.embed_tokens, Int8Embedding)
    expected = logits(load_model(open_checkpoint(plain.folder), dtype="float32"), seed)
    assert 0 < float((logits(loaded, seed) - expected).norm() / expected.norm()) < 0.05
    config = json.loads((report.folder / "config.json").read_text())
    assert config["quantization_config"]["huoyan_vocabulary"] == "int8"
    assert "vLLM does not" in summary(report)
    assert "vLLM" not in summary(plain)
    with pytest.raises(ModelError, match="already"):
        quantize(report.folder, tmp_path / "b")
    with pytest.raises(InputError, match="quantize_head"):
        quantize(source, tmp_path / "b", quantize_head="int3")


def test_a_stopped_run_with_another_head_is_not_gone_on_with(
    source: Path, items: list[CalibrationItem], tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        raise Stop

    common = {"method": "rtn", "group_size": 64, "calibration": items, "device": "cpu"}
    with pytest.raises(Stop):
        quantize(source, tmp_path / "out", step=stop, **common)
    said: list[str] = []
    report = quantize(source, tmp_path / "out", quantize_head="int8", note=said.append, **common)
    assert report.resumed_layers == 0
    assert "thrown away" in said[0]


def correlated(seed: int, inputs: int) -> Tensor:
    """Inputs that go together, which is where one weight can make up for another, some larger than others."""
    g = torch.Generator().manual_seed(seed)
    together = torch.randn(600, 16, generator=g) @ torch.randn(16, inputs, generator=g)
    return (together + torch.randn(600, inputs, generator=g)) * (0.3 + torch.rand(inputs, generator=g))


def products_error(weight: Tensor, x: Tensor, int4: Int4Weight) -> float:
    return float(((int4.dequantize() - weight) @ x.T).square().sum())


def test_compensated_rounding_is_nearer_in_its_products(seed: int) -> None:
    x = correlated(seed, 128)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed + 1))
    plain, nearer = round_to_int4(weight, 32), round_compensated(weight, damp_(gram(x)), 32)
    assert products_error(weight, x, nearer) < 0.7 * products_error(weight, x, plain)
    assert nearer.q.max() <= 15
    assert torch.equal(nearer.scales, plain.scales)


def test_compensated_rounding_against_one_input_at_a_time(seed: int) -> None:
    """The textbook: after each input the inverse of what is left of the products, anew, in float64; more than a block
    of inputs. A weight halfway between two levels may fall to either side, and what follows with it."""
    x = correlated(seed, 192)
    weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(seed + 1))
    products = damp_(gram(x))
    found = round_compensated(weight, products, 32)
    scales, zeros = (t.double().repeat_interleave(32, 1) for t in (found.scales, found.zeros))
    left, expected = weight.double(), torch.empty(40, 192)
    waiting = products.diagonal().argsort(descending=True).tolist()
    while waiting:
        i = waiting[0]
        inverse = torch.linalg.inv(products.double()[waiting][:, waiting])
        level = (torch.round(left[:, i] / scales[:, i]) + zeros[:, i]).clamp(0, 15)
        expected[:, i] = level
        error = (left[:, i] - (level - zeros[:, i]) * scales[:, i]) / inverse[0, 0]
        left[:, waiting] -= torch.outer(error, inverse[0])
        waiting = waiting[1:]
    same = (found.q == expected).all(1)
    assert same.float().mean() >= 0.9


def test_compensated_rounding_of_inputs_apart_is_plain(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 64, generator=g)
    plain = round_to_int4(weight, 32)
    apart = round_compensated(weight, torch.diag(torch.rand(64, generator=g) + 0.5), 32)
    assert torch.equal(apart.q, plain.q)
    assert torch.equal(apart.zeros, plain.zeros)


def compensated(weight: Tensor, x: Tensor) -> Int4Weight:
    products = damp_(gram(x))
    return fit_scales(weight, products, round_compensated(weight, products, 32))


def test_the_compensated_error_over_all_tokens(seed: int) -> None:
    x = correlated(seed, 128)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed + 1))
    products = gram(x)
    found = compensated_error(weight, products, 32)
    assert found == pytest.approx(products_error(weight, x, compensated(weight, x)) / len(x), rel=1e-3)
    assert torch.equal(products, gram(x))


def test_a_scale_helps_where_compensated_products_come_nearer(seed: int) -> None:
    """Over all tokens; scales at random harm, and those that take unevenness out of the weights help."""
    g = torch.Generator().manual_seed(seed)
    x, scale = correlated(seed, 128), torch.exp(torch.randn(128, generator=g))
    even = torch.randn(24, 128, generator=g)
    for weight, expected in ((even, False), (even / scale, True)):
        errors = [
            products_error(w, y, compensated(w, y)) for w, y in ((weight, x), (weight * scale, x / scale))
        ]
        assert (errors[1] < errors[0]) == expected
        assert scale_helps(weight, x, scale, 32) == expected


def test_a_scale_is_judged_by_tokens_that_count(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that do not count may be anything, and few of many outputs are enough."""
    judged: list[tuple[Tensor, Tensor]] = []

    def record(weight: Tensor, products: Tensor, group_size: int) -> float:
        assert group_size == 32
        judged.append((weight, products.clone()))
        return float(len(judged))

    monkeypatch.setattr(awq_module, "compensated_error", record)
    monkeypatch.setattr(awq_module, "CHECKED_OUTPUTS", 5)
    g = torch.Generator().manual_seed(seed)
    x, scale = correlated(seed, 64), torch.exp(torch.randn(64, generator=g))
    weight = torch.randn(12, 64, generator=g)
    counts = torch.cat([torch.ones(len(x)), torch.zeros(50)])
    assert not scale_helps(weight, torch.cat([x, 30 * torch.randn(50, 64, generator=g)]), scale, 32, counts)
    for (some, products), own, seen in zip(judged, (weight, weight * scale), (x, x / scale), strict=True):
        torch.testing.assert_close(some, own[::3])
        torch.testing.assert_close(products, gram(seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("helps", [True, False])
def test_scales_that_do_not_help_compensation_are_left_out(
    source: Path, items: list[CalibrationItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helps: bool
) -> None:
    monkeypatch.setattr(awq_module, "scale_helps", lambda *_, **__: helps)
    report = quantize(
        source, tmp_path / "out", compensate=True, group_size=64, calibration=items, device="cpu"
    )
    exponents = [e for note in report.layers for e in note["scale_exponents"].values()]
    assert any(e >= 0 for e in exponents) == helps
    before, after = (open_checkpoint(folder) for folder in (source, report.folder))
    norm = "llm.model.layers.1.input_layernorm.weight"
    with TensorReader(before.tensors) as old, TensorReader(after.tensors) as new:
        same = torch.equal(old.read(norm).half(), new.read(norm))
    assert same != helps


def test_dead_inputs_can_be_inverted(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 64, generator=g)
    x[:, 5:40] = 0
    weight = torch.randn(8, 64, generator=g)
    weight[3] = 0
    products = damp_(gram(x))
    for int4 in (rounded := round_compensated(weight, products, 32), fit_scales(weight, products, rounded)):
        assert torch.isfinite(int4.dequantize()).all()
        assert (int4.dequantize()[3] == 0).all()


def test_products_of_tokens_that_count_more(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, times = torch.randn(40, 16, generator=g), torch.randint(0, 4, (40,), generator=g)
    times[0] = 2
    torch.testing.assert_close(gram(x, times.float()), gram(x.repeat_interleave(times, 0)))


def test_kinds_of_tokens_have_their_shares(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    items, kinds = [], []
    for _ in range(5):
        words, pieces, answer = torch.randint(2, 20, (3,), generator=g).tolist()
        item = EncodedItem([0] * (pieces + words + answer), pieces + words)
        item.is_text = torch.arange(len(item.token_ids)) >= pieces
        items.append(item)
        # The last word of the question foretells the answer's first.
        kinds += [2] * pieces + [1] * (words - 1) + [0] * (answer + 1)
    weights = token_weights(items)
    for kind, share in enumerate(SHARES):
        own = weights[torch.tensor(kinds) == kind]
        assert float(own.sum() / weights.sum()) == pytest.approx(share, rel=1e-4)
        assert len(own.unique()) == 1
    assert float(weights.mean()) == pytest.approx(1)


def test_fitted_scales_against_least_squares(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, over all tokens, by torch's solver."""
    monkeypatch.setattr(compensate_module, "_CHUNK_VALUES", 128 * 7)
    x = correlated(seed, 128)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed + 1))
    products = damp_(gram(x))
    rounded = round_to_int4(weight, 32)
    fitted = fit_scales(weight, products, rounded)
    assert torch.equal(fitted.q, rounded.q)
    assert torch.equal(fitted.zeros, rounded.zeros)
    assert torch.equal(fitted.scales, fitted.scales.half().float())
    seen = torch.linalg.cholesky(products.double()).T
    for row in range(24):
        steps = (rounded.q[row].double() - rounded.zeros[row].double().repeat_interleave(32)).view(4, 32)
        columns = torch.stack([seen[:, 32 * g : 32 * g + 32] @ steps[g] for g in range(4)], 1)
        expected = torch.linalg.lstsq(columns, seen @ weight[row].double()).solution
        torch.testing.assert_close(fitted.scales[row].double(), expected, rtol=3e-3, atol=0)
    assert products_error(weight, x, fitted) < products_error(weight, x, rounded)


def test_scales_that_fit_already_are_kept(seed: int) -> None:
    exact = round_to_int4(torch.randn(24, 128, generator=torch.Generator().manual_seed(seed)), 32)
    fitted = fit_scales(exact.dequantize(), damp_(gram(correlated(seed, 128))), exact)
    torch.testing.assert_close(fitted.scales, exact.scales, rtol=2e-3, atol=0)


def test_compensated_checkpoint_costs_less(
    source: Path, items: list[CalibrationItem], results: dict[str, run_module.QuantizeReport], tmp_path: Path
) -> None:
    common = {"group_size": 64, "calibration": items, "device": "cpu"}
    report = quantize(source, tmp_path / "out", compensate=True, **common)
    pairs = list(zip(report.layers, results["awq"].layers, strict=True))
    assert sum(a["relative_error"] for a, _ in pairs) < sum(b["relative_error"] for _, b in pairs)
    assert sum(isinstance(m, Int4Linear) for m in load_model(open_checkpoint(report.folder)).modules()) == 8


def test_what_a_layer_adds_may_come_in_parts(seed: int) -> None:
    """As on a GPU, of few tokens."""
    g = torch.Generator().manual_seed(seed)
    layer = small_model(seed).llm.model.layers[0]
    width = layer.mlp.down_proj.weight.shape[0]
    inputs = LayerInputs(
        torch.randn(9, width, generator=g), [4, 5], RotaryTable(layer.self_attn.head_dim, 1e4, 64)
    )
    with torch.no_grad():
        want = inputs.run(layer)
        down = layer.mlp.down_proj

        def in_parts(x: Tensor, over: Tensor | None = None) -> Tensor:
            return torch.stack([down(x) / 4] * 4)

        down.parts = in_parts  # type: ignore[method-assign]
        torch.testing.assert_close(inputs.run(layer), want)
        torch.testing.assert_close(layer.mlp(inputs.x), down(layer.mlp.gate_up_proj.gated(inputs.x)))
