"""What of an int4 checkpoint stays in 16 bits, from the names of its tensors."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

import huoyan.tiny
from huoyan.models.checkpoint import open_checkpoint
from huoyan.vllm_plugin.int4 import complete_quantization_config, int4_modules, plain_modules
from tests.vllm_plugin.published import publish

INT4 = Path(huoyan.tiny.__file__).parent / "checkpoint-int4"


def checkpoint(rng: random.Random, suffix: str) -> tuple[dict[str, tuple[int, ...]], set[str], set[str]]:
    """Shapes by name, the int4 matrices, the plain ones. Only matrices of the decoder are int4, and not all of them."""
    int4, plain = set(), set()
    shapes: dict[str, tuple[int, ...]] = {"resampler.query": (64, 8), "llm.model.norm.weight": (8,)}
    for layer in range(rng.randint(1, 12)):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            vision = f"vpm.encoder.layers.{layer}.{name}"
            plain.add(vision)
            module = f"llm.model.layers.{layer}.{name}"
            (int4 if layer == 0 or rng.random() < 0.7 else plain).add(module)
    plain |= {"resampler.kv_proj", "llm.lm_head", "llm.model.embed_tokens"}
    shapes |= {f"{module}.weight": (8, 8) for module in plain}
    for module in int4:
        shapes |= {f"{module}.{suffix}": (8, 1), f"{module}.scales": (1, 8), f"{module}.bias": (8,)}
    return shapes, int4, plain


def test_plain_modules(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        shapes, int4, plain = checkpoint(rng, rng.choice(("qweight", "weight_packed")))
        found = plain_modules(shapes)
        assert int4_modules(shapes) == int4
        assert {"vpm", "resampler"} <= set(found)
        for module in plain:
            assert any(module == entry or module.startswith(f"{entry}.") for entry in found), module
        for module in int4:
            assert not any(entry in module for entry in found), module


def test_a_plain_layer_is_not_named_as_the_beginning_of_another() -> None:
    shapes = {f"llm.model.layers.{i}.mlp.up_proj.qweight": (8, 1) for i in range(10, 13)}
    shapes["llm.model.layers.1.mlp.up_proj.weight"] = (8, 8)
    assert plain_modules(shapes) == ["llm.model.layers.1.mlp"]


def complete(monkeypatch: pytest.MonkeyPatch, shapes: dict[str, Any], **quantization: Any) -> dict[str, Any]:
    monkeypatch.setattr("huoyan.vllm_plugin.int4._shapes", lambda model, revision: shapes)
    fields: dict[str, Any] = {"quantization_config": quantization}
    complete_quantization_config(fields, "a-name", None)
    result: dict[str, Any] = fields["quantization_config"]
    return result


@pytest.mark.parametrize(
    "given", [{}, {"modules_to_not_convert": None}, {"modules_to_not_convert": ["lm_head"]}]
)
def test_awq_as_vllm_matches_it(monkeypatch: pytest.MonkeyPatch, seed: int, given: dict[str, Any]) -> None:
    """vLLM skips a layer when an entry is anywhere in its name."""
    shapes, int4, plain = checkpoint(random.Random(seed), "qweight")
    found = complete(monkeypatch, shapes, quant_method="awq", bits=4, **given)
    listed = found["modules_to_not_convert"]
    assert all(any(entry in module for entry in listed) for module in plain)
    assert not any(entry in module for module in int4 for entry in listed)
    assert set(given.get("modules_to_not_convert") or ()) <= set(listed)
    assert found["bits"] == 4


def test_awq_that_lists_what_is_int4(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    shapes, int4, _ = checkpoint(random.Random(seed), "qweight")
    found = complete(monkeypatch, shapes, quant_method="awq", modules_to_not_convert=["llm", "visual"])
    assert "visual" in found["modules_to_not_convert"]
    assert not any(entry in module for module in int4 for entry in found["modules_to_not_convert"])


def test_compressed_tensors_as_vllm_matches_it(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """An entry is a whole name, or an expression behind `re:` that matches from the beginning."""
    shapes, int4, plain = checkpoint(random.Random(seed), "weight_packed")
    wrong = sorted(int4)[0]
    found = complete(
        monkeypatch, shapes, quant_method="compressed-tensors", ignore=["re:.*lm_head", "lm_head", wrong]
    )["ignore"]

    def ignored(module: str) -> bool:
        return any(
            re.match(entry.removeprefix("re:"), module) if entry.startswith("re:") else entry == module
            for entry in found
        )

    assert found[:2] == ["re:.*lm_head", "lm_head"]
    assert all(map(ignored, plain))
    assert not any(map(ignored, int4))


@pytest.mark.parametrize("quantization", [None, {"quant_method": "gptq"}, {"quant_method": "fp8"}, "awq"])
def test_other_configs_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, seed: int, quantization: Any
) -> None:
    shapes, *_ = checkpoint(random.Random(seed), "qweight")
    monkeypatch.setattr("huoyan.vllm_plugin.int4._shapes", lambda model, revision: shapes)
    fields = {"quantization_config": quantization}
    complete_quantization_config(fields, "a-name")
    assert fields == {"quantization_config": quantization}


def test_without_int4_tensors_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for shapes in ({}, {"vpm.encoder.layers.0.mlp.fc1.weight": (8, 8)}):
        assert complete(monkeypatch, shapes, quant_method="awq") == {"quant_method": "awq"}


def test_it_reads_a_folder(tmp_path: Path) -> None:
    folder = publish(INT4, tmp_path / "published")
    fields: dict[str, Any] = {
        "quantization_config": {"quant_method": "AWQ", "modules_to_not_convert": ["lm_head"]}
    }
    complete_quantization_config(fields, str(folder))
    listed = fields["quantization_config"]["modules_to_not_convert"]
    assert listed == ["llm.lm_head", "llm.model.embed_tokens", "lm_head", "resampler", "vpm"]
    assert not any(
        name.endswith(".qweight") for name in open_checkpoint(folder).tensors if name.startswith("vpm")
    )
