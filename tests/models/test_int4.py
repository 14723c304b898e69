"""Int4 in every published format: packed here a value at a time, read by the loader, equal to dense."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from huoyan.errors import ModelError
from huoyan.layers import int4
from huoyan.layers.int4 import Int4Linear, Int4Weight
from huoyan.models.checkpoint import open_checkpoint
from huoyan.models.int4_formats import AWQ_ORDER, pack_nibbles, unpack_nibbles
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.weights import load_model, published_state, write_shards
from tests.models.small import small_model, write_checkpoint
from tests.models.test_forward import causal

Tensors = dict[str, Tensor]


def words_along_columns(q: Tensor, order: tuple[int, ...]) -> Tensor:
    """[n, 8 m] -> int32 [n, m], a value at a time."""
    out = torch.zeros(q.shape[0], q.shape[1] // 8, dtype=torch.int64)
    for k, column in enumerate(order):
        for word in range(out.shape[1]):
            out[:, word] |= q[:, 8 * word + column].long() << (4 * k)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def awq(w: Int4Weight) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words_along_columns(w.q.T, order),
        "qzeros": words_along_columns(w.zeros.T, order),
        "scales": w.scales.T.half(),
    }


def gptq(w: Int4Weight) -> Tensors:
    plain = tuple(range(8))
    return {
        "qweight": words_along_columns(w.q, plain).T,
        "qzeros": words_along_columns(w.zeros.T - 1, plain),
        "scales": w.scales.T.half(),
        "g_idx": (torch.arange(w.q.shape[1]) // w.group_size).int(),
    }


def compressed(w: Int4Weight) -> Tensors:
    plain = tuple(range(8))
    return {
        "weight_packed": words_along_columns(w.q, plain),
        "weight_scale": w.scales.half(),
        "weight_zero_point": words_along_columns(w.zeros.T, plain).T,
        "weight_shape": torch.tensor(w.q.shape),
    }


def compressed_symmetric(w: Int4Weight) -> Tensors:
    return {k: v for k, v in compressed(w).items() if k != "weight_zero_point"}


def random_int4(shape: torch.Size, group: int, seed: int, symmetric: bool) -> Int4Weight:
    g = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = columns // (group or columns)
    scales = ((torch.rand(rows, groups, generator=g) + 0.5) * 0.2 * columns**-0.5).half().float()
    zeros = torch.randint(1, 16, (rows, groups), generator=g).float()
    q = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
    return Int4Weight(q, scales, torch.full_like(zeros, 8.0) if symmetric else zeros)


def write_int4(
    folder: Path,
    model: MiniCPMV,
    pack: Callable[[Int4Weight], Tensors],
    group: int,
    seed: int,
    symmetric: bool = False,
) -> MiniCPMV:
    """Write `model` with its decoder's matrices replaced by random int4; returns the equal dense model."""
    write_checkpoint(folder, model)
    state = dict(published_state(model))
    for name in list(state):
        if ".layers." in name and name.startswith("llm.") and name.endswith("proj.weight"):
            weight = random_int4(state[name].shape, group, seed + len(name), symmetric)
            state[name].copy_(weight.dequantize())
            del state[name]
            for suffix, value in pack(weight).items():
                state[name.removesuffix("weight") + suffix] = value
    for file in folder.glob("model*"):
        file.unlink()
    write_shards({n: v.contiguous() for n, v in state.items()}, folder, 300_000)
    return model


@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize(
    "pack, symmetric", [(awq, False), (gptq, False), (compressed, False), (compressed_symmetric, True)]
)
def test_published_formats(
    tmp_path: Path, seed: int, pack: Callable[[Int4Weight], Tensors], symmetric: bool, group: int
) -> None:
    dense = write_int4(tmp_path / "m", small_model(seed), pack, group, seed, symmetric)
    loaded = load_model(open_checkpoint(tmp_path / "m"))
    assert sum(isinstance(m, Int4Linear) for m in loaded.modules()) == 4 * 2
    ids = torch.randint(0, 300, (9,), generator=torch.Generator().manual_seed(seed))
    expected, got = (m.decoder(m.embed(ids), torch.arange(9), causal) for m in (dense, loaded))
    assert (got - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("shape", [(64, 256), (48, 96), (24, 64), (17, 32), (32, 36)])
def test_linear(seed: int, dtype: torch.dtype, bound: float, shape: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    weight = random_int4(torch.Size(shape), 32 if shape[1] % 32 == 0 else 12, seed, False)
    bias = torch.randn(shape[0])
    layer = Int4Linear(weight, bias, dtype=dtype, device=torch.device("cpu"))
    for rows in (1, 3, 40):
        x = torch.randn(2, rows, shape[1]).to(dtype)
        expected = x.float() @ weight.dequantize().T + bias
        assert (layer(x).float() - expected).norm() / expected.norm() < bound


def test_nibbles_round_trip(seed: int) -> None:
    q = torch.randint(0, 16, (5, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    for order in (AWQ_ORDER, tuple(range(8))):
        assert torch.equal(pack_nibbles(q, order), words_along_columns(q, order))
        assert torch.equal(unpack_nibbles(pack_nibbles(q, order), order), q)


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(open_checkpoint(folder))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_activation_order_is_refused(tmp_path: Path, seed: int) -> None:
    def shuffled(w: Int4Weight) -> Tensors:
        tensors = gptq(w)
        tensors["g_idx"] = tensors["g_idx"].flip(0)
        return tensors

    write_int4(tmp_path / "m", small_model(seed), shuffled, 64, seed)
    refuse(tmp_path / "m", "g_idx", "desc_act")


def test_other_widths_are_refused(tmp_path: Path, seed: int) -> None:
    def eight_bits(w: Int4Weight) -> Tensors:
        tensors = awq(w)
        tensors["qweight"] = torch.cat([tensors["qweight"]] * 2, dim=1)
        return tensors

    write_int4(tmp_path / "m", small_model(seed), eight_bits, 64, seed)
    refuse(tmp_path / "m", "qweight", "8-bit", "AutoAWQ")


def test_half_quantized_stack_is_refused(tmp_path: Path, seed: int) -> None:
    model = small_model(seed)
    dense = published_state(small_model(seed))
    write_int4(tmp_path / "m", model, awq, 64, seed)
    checkpoint = open_checkpoint(tmp_path / "m")
    with_reader = load_model(checkpoint)
    assert with_reader is not None
    from safetensors.torch import load_file

    state = {}
    for file in sorted((tmp_path / "m").glob("*.safetensors")):
        state.update(load_file(file))
        file.unlink()
    name = "llm.model.layers.0.self_attn.v_proj."
    for suffix in ("qweight", "qzeros", "scales"):
        del state[name + suffix]
    state[name + "weight"] = dense[name + "weight"].contiguous()
    write_shards(state, tmp_path / "m", 10**9)
    refuse(tmp_path / "m", "v_proj", "int4")


@pytest.mark.parametrize(
    "said",
    [
        None,
        {},
        {"quant_method": "awq"},
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["mlp"]},
        "awq",
    ],
)
def test_the_tensors_decide_not_the_config(tmp_path: Path, seed: int, said: object) -> None:
    dense = write_int4(tmp_path / "m", small_model(seed), awq, 64, seed)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config.pop("quantization_config", None)
    if said is not None:
        config["quantization_config"] = said
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    loaded = load_model(open_checkpoint(tmp_path / "m"))
    assert sum(isinstance(m, Int4Linear) for m in loaded.modules()) == 4 * 2
    ids = torch.randint(0, 300, (9,), generator=torch.Generator().manual_seed(seed))
    expected, got = (m.decoder(m.embed(ids), torch.arange(9), causal) for m in (dense, loaded))
    assert (got - expected).norm() / expected.norm() < 1e-4


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    from safetensors.torch import load_file

    state: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
        file.unlink()
    change(state)
    write_shards({n: v.contiguous() for n, v in state.items()}, folder, 10**9)


MATRIX = "llm.model.layers.0.self_attn.o_proj."


def fp8(state: Tensors) -> None:
    state[MATRIX + "weight"] = state[MATRIX + "weight"].to(torch.float8_e4m3fn)
    state[MATRIX + "weight_scale"] = torch.ones(1)


def int8(state: Tensors) -> None:
    state[MATRIX + "weight"] = torch.zeros(state[MATRIX + "weight"].shape, dtype=torch.int8)
    state[MATRIX + "weight_scale"] = torch.ones(256, 1)


def bitsandbytes(state: Tensors) -> None:
    state[MATRIX + "weight"] = torch.zeros(256 * 128, 1, dtype=torch.uint8)
    state[MATRIX + "weight.absmax"] = torch.ones(1024)
    state[MATRIX + "weight.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)


def nvfp4(state: Tensors) -> None:
    del state[MATRIX + "weight"]
    state[MATRIX + "weight_packed"] = torch.zeros(256, 128, dtype=torch.uint8)
    state[MATRIX + "weight_global_scale"] = torch.ones(1)


@pytest.mark.parametrize(
    "change, name",
    [(fp8, "FP8"), (int8, "8-bit integers"), (bitsandbytes, "bitsandbytes"), (nvfp4, "NVFP4")],
)
def test_other_formats_are_refused_by_name(
    tmp_path: Path, seed: int, change: Callable[[Tensors], None], name: str
) -> None:
    write_checkpoint(tmp_path / "m", small_model(seed))
    rewrite(tmp_path / "m", change)
    refuse(tmp_path / "m", name, "o_proj", "not supported")


def test_eight_bit_gptq_is_refused(tmp_path: Path, seed: int) -> None:
    def eight_bits(w: Int4Weight) -> Tensors:
        tensors = gptq(w)
        tensors["qweight"] = torch.cat([tensors["qweight"]] * 2, dim=0)
        return tensors

    write_int4(tmp_path / "m", small_model(seed), eight_bits, 64, seed)
    refuse(tmp_path / "m", "qweight", "8-bit")


def test_the_scratch_is_as_large_as_the_largest_matrix_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(out: int, width: int) -> Int4Linear:
        weight = Int4Weight(
            torch.zeros(out, width, dtype=torch.uint8), torch.ones(out, 1), torch.zeros(out, 1)
        )
        made = Int4Linear(weight, None, dtype=torch.float16, device=torch.device("cpu"))
        made.packing = "words"
        return made

    monkeypatch.setattr(int4, "_SCRATCHES", {})
    int4.reserve_scratch(torch.nn.ModuleList([torch.nn.Linear(2, 2)]), torch.zeros(1))
    assert not int4._SCRATCHES
    model = torch.nn.ModuleList([linear(64, 128), linear(192, 256), linear(320, 128)])
    int4.reserve_scratch(model, torch.zeros(1, dtype=torch.float16))
    (made,) = int4._SCRATCHES.values()
    assert made.numel() == 192 * 256
    assert made.dtype is torch.float16
