"""Downloading from the hub: what is fetched, what happens when it breaks, what is said."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.hub.conftest import Resolve
from tests.hub.server import COMMIT, Hub

NAME = "openbmb/MiniCPM-V-2_6"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def model_files(seed: int, shard_size: int = 300_000) -> dict[str, bytes]:
    rng = random.Random(seed)
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {
        "config.json": b'{"model_type": "minicpmv", "version": 2.6, "torch_dtype": "bfloat16"}',
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        SHARDS[0]: rng.randbytes(shard_size),
        SHARDS[1]: rng.randbytes(shard_size),
        "modeling_minicpmv.py": b"import os",
        "pytorch_model.bin": b"pickle" * 1000,
        "onnx/model.safetensors": b"other" * 1000,
        "README.md": b"read me",
    }


def test_data_comes_and_code_does_not(hub: Hub, resolve: Resolve, seed: int) -> None:
    files = model_files(seed)
    hub.add(NAME, files)
    folder = Path(resolve(NAME)["folder"])
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert present == {"config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS}
    assert all((folder / name).read_bytes() == files[name] for name in present)
    assert folder.name == COMMIT
    assert not any(path.name.endswith((".lock", "-partial")) for path in (folder / "../../blobs").iterdir())


def test_what_is_whole_is_used_without_the_network(hub: Hub, resolve: Resolve, seed: int) -> None:
    hub.add(NAME, model_files(seed))
    first = resolve(NAME)["folder"]
    hub.requests.clear()
    assert resolve(NAME)["folder"] == first
    assert resolve(NAME, revision="main")["folder"] == first
    assert resolve(NAME, revision=COMMIT)["folder"] == first
    assert resolve(NAME, environment={"HF_HUB_OFFLINE": "1"})["folder"] == first
    assert hub.requests == []


def test_an_interrupted_download_goes_on_where_it_stopped(hub: Hub, resolve: Resolve, seed: int) -> None:
    files = model_files(seed)
    hub.add(NAME, files)
    hub.break_after = 200_000
    broken = resolve(NAME)
    assert broken["code"] == 3
    assert "HTTP 503" in broken["error"]
    assert "\n" not in broken["error"]
    offline = resolve(NAME, environment={"HF_HUB_OFFLINE": "1"})
    assert "partly downloaded" in offline["error"] or "not downloaded" in offline["error"]
    before = dict(hub.sent)
    hub.break_after = hub.fail_with = None
    hub.requests.clear()
    folder = Path(resolve(NAME)["folder"])
    assert all((folder / name).read_bytes() == files[name] for name in SHARDS)
    ranges = [wanted for _, path, wanted in hub.requests if wanted and SHARDS[0] in path]
    assert ranges, "the second attempt began from the start"
    again = hub.sent[SHARDS[0]] - before[SHARDS[0]]
    assert again < len(files[SHARDS[0]]) - 100_000, f"{again} bytes were fetched twice"


def test_a_damaged_part_is_thrown_away(hub: Hub, resolve: Resolve, seed: int, tmp_path: Path) -> None:
    files = model_files(seed)
    hub.add(NAME, files)
    hub.break_after = 200_000
    resolve(NAME)
    hub.break_after = hub.fail_with = None
    (partial,) = (tmp_path / "hf/hub").rglob("*-partial")
    content = partial.read_bytes()
    partial.write_bytes(b"x" * len(content))
    assert "damaged" in resolve(NAME)["error"]
    folder = Path(resolve(NAME)["folder"])
    assert (folder / SHARDS[0]).read_bytes() == files[SHARDS[0]]


def test_a_shard_missing_from_the_cache_is_fetched(hub: Hub, resolve: Resolve, seed: int) -> None:
    files = model_files(seed)
    hub.add(NAME, files)
    folder = Path(resolve(NAME)["folder"])
    (folder / SHARDS[1]).resolve().unlink()
    offline = resolve(NAME, environment={"HF_HUB_OFFLINE": "1"})
    assert f"only partly downloaded (no {SHARDS[1]})" in offline["error"]
    assert Path(resolve(NAME)["folder"], SHARDS[1]).read_bytes() == files[SHARDS[1]]


@pytest.mark.parametrize(
    ("situation", "words"),
    [
        ("unknown", ["has no model", "HF_TOKEN"]),
        ("gated", ["gated", "accept its terms"]),
        ("revision", ["no revision 'v9'"]),
        ("pickled", ["no safetensors", "run code"]),
        ("server", ["HTTP 503"]),
        ("unreachable", ["cannot be reached", "HF_ENDPOINT", "--model tiny"]),
        ("offline", ["not downloaded", "HF_HUB_OFFLINE", "--model tiny"]),
        ("other model", ["has no tokenizer.json"]),
    ],
)
def test_what_goes_wrong_is_one_line(
    hub: Hub, resolve: Resolve, seed: int, situation: str, words: list[str]
) -> None:
    files = model_files(seed)
    environment: dict[str, str] = {}
    given: dict[str, str] = {}
    if situation == "gated":
        hub.gated.add(NAME)
    elif situation == "revision":
        given["revision"] = "v9"
    elif situation == "pickled":
        files = {name: content for name, content in files.items() if "safetensors" not in name}
    elif situation == "server":
        hub.fail_with = 503
    elif situation == "unreachable":
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    elif situation == "offline":
        environment["HF_HUB_OFFLINE"] = "1"
    elif situation == "other model":
        del files["tokenizer.json"]
    if situation != "unknown":
        hub.add(NAME, files)
    result = resolve(NAME, environment=environment, **given)
    assert result["code"] == 3
    assert "\n" not in result["error"]
    assert all(word in result["error"] for word in words), result["error"]
    assert "Traceback" not in result["stderr"]


def test_the_token_is_sent_to_the_mirror(hub: Hub, resolve: Resolve, seed: int) -> None:
    hub.add(NAME, model_files(seed))
    resolve(NAME, environment={"HF_TOKEN": "hf_secret"})
    assert hub.authorizations == {"Bearer hf_secret"}


def test_a_pipe_sees_no_bars(hub: Hub, resolve: Resolve, seed: int) -> None:
    hub.add(NAME, model_files(seed))
    assert resolve(NAME)["stderr"] == ""


def test_modelscope_says_what_to_install(resolve: Resolve) -> None:
    pytest.importorskip("huggingface_hub")
    try:
        import modelscope  # noqa: F401
    except ImportError:
        assert "pip install 'huoyan[modelscope]'" in resolve(NAME, hub="modelscope")["error"]
    else:
        pytest.skip("modelscope is installed")


def test_a_modelscope_download_is_found(resolve: Resolve, seed: int, tmp_path: Path) -> None:
    for layout in ("models/openbmb/MiniCPM-V-2___6", "models/openbmb--MiniCPM-V-2.6/snapshots/master"):
        folder = tmp_path / "ms" / layout
        folder.mkdir(parents=True)
        for name, content in model_files(seed).items():
            if "/" not in name:
                (folder / name).write_bytes(content)
        assert resolve("openbmb/MiniCPM-V-2.6", hub="modelscope") == {"folder": str(folder), "stderr": ""}
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
