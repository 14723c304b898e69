"""What a checkpoint folder can have wrong, each said in one line; and what is read is what was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from huoyan.errors import InputError, ModelError
from huoyan.layers.int4 import Int4Linear
from huoyan.layers.int8 import Int8Linear
from huoyan.models import weights
from huoyan.models.checkpoint import INDEX, open_checkpoint
from huoyan.models.weights import load_model, published_state, write_shards
from tests.models.small import CONFIG, small_model, write_checkpoint
from tests.models.test_forward import causal


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "good", small_model(7))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(open_checkpoint(folder))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("shard_bytes", [10**9, 300_000])
def test_round_trip(tmp_path: Path, seed: int, shard_bytes: int) -> None:
    model = small_model(seed)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", model, shard_bytes=shard_bytes))
    seen: list[tuple[int, int]] = []
    loaded = load_model(checkpoint, progress=lambda done, total: seen.append((done, total)))
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert all(not p.requires_grad for p in loaded.parameters())


def test_dtypes(good: Path) -> None:
    checkpoint = open_checkpoint(good)
    for name in ("float32", "float16", "bfloat16"):
        model = load_model(checkpoint, dtype=name)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}
    with pytest.raises(InputError, match="int7"):
        load_model(checkpoint, dtype="int7")


def test_published_names(good: Path) -> None:
    names = set(open_checkpoint(good).tensors)
    assert "llm.model.layers.0.self_attn.q_proj.bias" in names
    assert "llm.model.layers.1.mlp.gate_proj.weight" in names
    assert "vpm.encoder.layers.1.self_attn.v_proj.weight" in names
    assert open_checkpoint(good).tensors["vpm.embeddings.patch_embedding.weight"].shape == (144, 3, 14, 14)


def test_tied_embeddings(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "tied", small_model(3, tie_word_embeddings=True), tie_word_embeddings=True
    )
    model = load_model(open_checkpoint(folder))
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight or torch.equal(
        model.llm.lm_head.weight, model.llm.model.embed_tokens.weight
    )


def test_missing_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "nothing", "not a folder")


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuse(folder, "config.json", "download it again")


def test_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json", "JSON")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"version": 2.5}, "2.5"),
        ({"version": 4.5}, "4.5"),
        ({"model_type": "llava"}, "llava"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vision_config": {}}, "vision_config"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ],
)
def test_unusable_config(folder: Path, change: dict[str, object], word: str) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    refuse(folder, "config.json", word)


def test_missing_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(folder, shard.name, "incomplete")


def test_cut_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    refuse(folder, shard.name, "bytes")
    shard.write_bytes(shard.read_bytes()[:5])
    refuse(folder, shard.name)
    shard.write_bytes(b"")
    refuse(folder, shard.name)


def test_damaged_header(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[8:20] = b"xxxxxxxxxxxx"
    shard.write_bytes(bytes(data))
    refuse(folder, shard.name, "header")


def test_no_index_or_no_weights(folder: Path) -> None:
    (folder / INDEX).unlink()
    refuse(folder, INDEX)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    refuse(folder, "safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refuse(folder, "pickled")


def test_index_that_leaves_the_folder(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    refuse(folder, "outside")


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    state = dict(published_state(small_model(7)))
    for name, value in change.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    for file in folder.glob("model*"):
        file.unlink()
    write_shards({n: v.contiguous() for n, v in state.items()}, folder, 10**9)


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, {"llm.model.layers.1.mlp.up_proj.weight": None})
    refuse(folder, "llm.model.layers.1.mlp.up_proj.weight", "lacks 1 tensor")


def test_extra_tensor(folder: Path) -> None:
    rewrite(folder, {"llm.model.layers.2.mlp.up_proj.weight": torch.zeros(3, 3)})
    refuse(folder, "llm.model.layers.2.mlp.up_proj.weight", "1 tensor")


def test_computed_tensors_are_passed_over(folder: Path) -> None:
    rewrite(folder, {"resampler.pos_embed": torch.zeros(70, 70, 256)})
    load_model(open_checkpoint(folder))


def test_misshapen_tensor(folder: Path) -> None:
    rewrite(folder, {"llm.model.layers.0.self_attn.k_proj.weight": torch.zeros(64, 256)})
    refuse(folder, "k_proj", "[64, 256]", "[128, 256]")


def test_dummy_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelError):
        open_checkpoint(tmp_path)
    model = load_model(open_checkpoint(tmp_path, need_weights=False), load_format="dummy", seed=1)
    again = load_model(open_checkpoint(tmp_path, need_weights=False), load_format="dummy", seed=1)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.isfinite(a).all(), name
        assert torch.equal(a, b), name


def test_dummy_int4_is_never_dense(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"quant_method": "awq", "group_size": 64, "huoyan_vocabulary": "int8"}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": said}))
    made: list[str] = []
    original = weights.random_parameter

    def remember(name: str, *rest: Any) -> torch.Tensor:
        made.append(name)
        return original(name, *rest)

    monkeypatch.setattr(weights, "random_parameter", remember)
    model = load_model(open_checkpoint(tmp_path, need_weights=False), load_format="dummy", seed=seed)
    assert "llm.model.layers.0.self_attn.qkv_proj.bias" in made
    assert not [name for name in made if name.startswith("llm.") and name.endswith("_proj.weight")]
    assert not {"llm.lm_head.weight", "llm.model.embed_tokens.weight"} & set(made)
    assert sum(isinstance(m, Int4Linear) for m in model.modules()) == 4 * 2
    assert isinstance(model.llm.lm_head, Int8Linear)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    out = model.logits(model.decoder(model.embed(torch.arange(9)), torch.arange(9), causal))
    assert 0.3 < float(out.std()) < 10
