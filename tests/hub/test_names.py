"""What a model's name may be, and what is on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from huoyan.errors import HuoyanError, InputError, ModelError
from huoyan.models import local_models
from huoyan.models.hub import resolve_model
from huoyan.models.local_models import describe, list_local_models, missing_files


def write_model(folder: Path, shards: int = 2, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "minicpmv", "version": 2.6, "torch_dtype": "bfloat16", **config})
    )
    (folder / "tokenizer.json").write_text("{}")
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}})
    )
    for name in names:
        (folder / name).write_bytes(b"0" * 1000)
    return folder


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "name is empty"),
        ("./nowhere", "no folder"),
        ("/no/such/folder", "no folder"),
        ("C:\\models\\x", "no folder"),
        ("MiniCPM-V-2_6", "neither a folder here nor a hub name"),
        ("tinny", "--model tiny"),
        ("a b/c", "neither"),
        ("org/na me", "neither"),
    ],
)
def test_what_is_no_name_is_said(name: str, words: str) -> None:
    with pytest.raises(HuoyanError, match=words) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_a_path_is_never_looked_up_on_a_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder|neither"):
        resolve_model(Path("openbmb/MiniCPM-V-2_6"))
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(file)


def test_an_unknown_hub_is_named() -> None:
    with pytest.raises(InputError, match="huggingface or modelscope"):
        resolve_model("a/b", hub="github")


@pytest.mark.parametrize("name", ["tiny", "tiny-int4"])
def test_embedded_models_lie_in_the_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_models, "embedded_folder", lambda name: tmp_path / name)
    monkeypatch.setattr("huoyan.models.hub.embedded_folder", lambda name: tmp_path / name)
    with pytest.raises(ModelError, match="install huoyan's wheel again"):
        resolve_model(name)
    write_model(tmp_path / name)
    assert resolve_model(name) == tmp_path / name


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    assert missing_files(folder) == ()
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    assert missing_files(folder) == ("tokenizer.json", "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{broken")
    assert missing_files(folder) == ("tokenizer.json", "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").unlink()
    assert missing_files(folder) == ("tokenizer.json", "model.safetensors")


def test_a_link_to_nothing_is_missing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    shard = folder / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(tmp_path / "blobs" / "not-there")
    assert missing_files(folder) == (shard.name,)


def test_the_list_tells_int4_from_dense_and_whole_from_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, ms = tmp_path / "hf", tmp_path / "ms"
    monkeypatch.setenv("HF_HUB_CACHE", str(hf))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(ms))
    first = hf / "models--openbmb--MiniCPM-V-2_6"
    write_model(first / "snapshots" / "abc")
    (first / "refs").mkdir()
    (first / "refs" / "main").write_text("abc")
    partial = write_model(hf / "models--some--int4--twice" / "snapshots" / "def")
    weight_map = {
        "layer.qweight": "model-00001-of-00002.safetensors",
        "norm": "model-00002-of-00002.safetensors",
    }
    (partial / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (partial / "model-00001-of-00002.safetensors").unlink()
    other = write_model(hf / "models--bert--base" / "snapshots" / "ghi")
    (other / "config.json").write_text('{"model_type": "bert"}')
    write_model(ms / "models" / "openbmb" / "MiniCPM-V-2___6")
    found = {model.name: model for model in list_local_models() if model.source != "embedded"}
    assert set(found) == {"openbmb/MiniCPM-V-2_6", "some/int4--twice", "openbmb/MiniCPM-V-2.6"}
    whole = found["openbmb/MiniCPM-V-2_6"]
    assert (whole.complete, whole.int4, whole.dtype, whole.version) == (True, False, "bfloat16", "2.6")
    assert whole.size > 2000
    assert (found["some/int4--twice"].complete, found["some/int4--twice"].int4) == (False, True)
    assert found["openbmb/MiniCPM-V-2.6"].source == "modelscope"


def test_int4_without_an_index_or_weights(tmp_path: Path) -> None:
    for said, int4 in (({"bits": 4}, True), ({"bits": 8}, False), (None, False)):
        folder = write_model(tmp_path / str(said), quantization_config=said)
        (folder / "model.safetensors.index.json").unlink()
        assert describe("x", "folder", folder).int4 is int4
    header = json.dumps({"a.weight_packed": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"0000"
    (folder / "model.safetensors").write_bytes(data)
    assert describe("x", "folder", folder).int4


def test_a_folder_that_is_no_checkpoint_is_described_all_the_same(tmp_path: Path) -> None:
    model = describe("x", "folder", tmp_path)
    assert (model.complete, model.version, model.size) == (False, None, 0)
