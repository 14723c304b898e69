"""Random checkpoints are whole, repeatable, and load like published ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from huoyan.bench.random_checkpoint import SHAPES, CheckpointShape, main, write_random_checkpoint
from huoyan.errors import InputError
from huoyan.models.checkpoint import INDEX, open_checkpoint
from huoyan.models.weights import load_model, published_state

SHAPE = CheckpointShape(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=400,
    vision_hidden_size=48,
    vision_intermediate_size=72,
    vision_num_hidden_layers=1,
    vision_num_attention_heads=3,
    vision_image_size=140,
    query_num=16,
    scale_resolution=140,
)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return found


def test_loads_and_every_tensor_is_as_written(tmp_path: Path, seed: int) -> None:
    folder = write_random_checkpoint(tmp_path / "c", SHAPE, seed=seed, dtype="float32", shard_bytes=200_000)
    written = _tensors(folder)
    model = load_model(open_checkpoint(folder), dtype="float32")
    loaded = published_state(model)
    assert loaded.keys() == written.keys()
    for name, value in loaded.items():
        assert torch.equal(value, written[name]), name


def test_shards_and_index(tmp_path: Path, seed: int) -> None:
    folder = write_random_checkpoint(tmp_path / "c", SHAPE, seed=seed, shard_bytes=100_000)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not list(folder.glob("*.partial"))
    written = _tensors(folder)
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in written.values())
    for file in files:
        with safe_open(folder / file, "pt") as reader:
            sizes = [reader.get_tensor(name).nbytes for name in reader.keys()]  # noqa: SIM118
        assert len(sizes) == 1 or sum(sizes) <= 100_000


def test_same_seed_same_weights(tmp_path: Path, seed: int) -> None:
    folders = [
        write_random_checkpoint(tmp_path / str(i), SHAPE, seed=s)
        for i, s in enumerate((seed, seed, seed + 1))
    ]
    first, again, other = map(_tensors, folders)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert (folders[0] / "tokenizer.json").read_text() == (folders[1] / "tokenizer.json").read_text()


def test_norms_and_biases_would_be_missed(tmp_path: Path, seed: int) -> None:
    written = _tensors(write_random_checkpoint(tmp_path / "c", SHAPE, seed=seed, dtype="float32"))
    for name, value in written.items():
        if value.dim() == 1:
            assert value.std() > 0.05, name


def test_awq_is_int4_in_the_decoder_alone(tmp_path: Path, seed: int) -> None:
    folder = write_random_checkpoint(tmp_path / "c", SHAPE, seed=seed, dtype="float16", quantization="awq")
    written = _tensors(folder)
    down = "llm.model.layers.0.mlp.down_proj"
    assert written[f"{down}.qweight"].shape == (256, 128 // 8)
    assert written[f"{down}.qzeros"].shape == (256 // 128, 128 // 8)
    assert written[f"{down}.scales"].shape == (256 // 128, 128)
    assert f"{down}.weight" not in written
    int4 = {name for name in written if name.endswith("qweight")}
    assert len(int4) == 7 * 2
    assert all(name.startswith("llm.model.layers.") for name in int4)
    model = load_model(open_checkpoint(folder), dtype="float32")
    eye = torch.eye(256)
    dense = model.get_submodule(down)(eye)
    # As `random_parameter` would have made it: fan-in scaled, centred.
    assert 0.8 < dense.std() * 256**0.5 < 1.2
    assert dense.mean().abs() < 0.01


def test_total_bytes_are_told_beforehand(tmp_path: Path) -> None:
    for quantization in (None, "awq"):
        told: list[tuple[int, int]] = []
        write_random_checkpoint(
            tmp_path / str(quantization),
            SHAPE,
            quantization=quantization,
            shard_bytes=100_000,
            progress=lambda done, of, told=told: told.append((done, of)),
        )
        assert told[-1][0] == told[-1][1]
        assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_tokenizer_fills_the_vocabulary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = write_random_checkpoint(tmp_path / "c", replace(SHAPE, vocab_size=3000))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 3000
    assert tokenizer.token_to_id("<unk>") >= 3000 - 23
    for text in ("请描述 this picture <image> 12", "naïve\n\n  x"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode([2500])


def test_the_full_shape_is_the_published_one() -> None:
    from huoyan.bench.checkpoint_shapes import config_of
    from huoyan.bench.random_checkpoint import _total_bytes
    from huoyan.models.config import parse_model_config

    config = parse_model_config(config_of(SHAPES["full"], "bfloat16", None))
    total = _total_bytes(config, torch.bfloat16, None)
    assert 8.09e9 < total / 2 < 8.11e9


@pytest.mark.parametrize(
    ("shape", "options", "line"),
    [
        ("huge", {}, "shape 'huge'"),
        (SHAPE, {"quantization": "gptq"}, "quantization 'gptq'"),
        (SHAPE, {"dtype": "int8"}, "dtype 'int8'"),
        (replace(SHAPE, vocab_size=100), {}, "vocabulary of 100"),
        (replace(SHAPE, hidden_size=192), {}, "multiple of 128"),
        (replace(SHAPE, intermediate_size=200), {"quantization": "awq"}, "group_size"),
    ],
)
def test_wrong_sizes_are_one_line(
    tmp_path: Path, shape: str | CheckpointShape, options: dict[str, str], line: str
) -> None:
    with pytest.raises(InputError, match=line) as error:
        write_random_checkpoint(tmp_path / "c", shape, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        write_random_checkpoint(tmp_path, SHAPE)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "c"), "--layers", "1", "--quantization", "awq"]) == 0
    assert open_checkpoint(tmp_path / "c").config.text.num_hidden_layers == 1
    assert capsys.readouterr().out.strip() == str(tmp_path / "c")
    assert main([str(tmp_path / "c")]) == 2
    assert "exists already" in capsys.readouterr().err
