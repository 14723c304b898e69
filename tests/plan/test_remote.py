"""A plan of a model that is not here: headers over HTTP, and nothing else."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub.server import COMMIT, Hub
from tests.models.small import CONFIG, small_model, write_checkpoint

NAME = "someone/MiniCPM-V-2_6"
RULES = {"scale_resolution": 112, "patch_size": 14, "max_slice_nums": 9, "image_feature_size": 16}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub().serving() as serving:
        yield serving


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    """A checkpoint in several shards, padded so that its tensors are far more than its headers."""
    made = write_checkpoint(tmp_path / "model", small_model(seed), shard_bytes=900_000)
    (made / "preprocessor_config.json").write_text(json.dumps(RULES))
    (made / "tokenizer.json").write_text("{}")
    assert len(list(made.glob("*.safetensors"))) > 2
    return made


def run(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's settings are read once."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUOYAN_"))}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HOME": str(home), "NO_PROXY": "*"}
    kept |= settings | {"PYTHONPATH": str(REPOSITORY / "src")} | environment
    command = [sys.executable, "-m", "huoyan.cli.main", "plan", *arguments, "--gpu", "2GiB", "--json"]
    return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=60, check=False)


def plan_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return {name: value for name, value in result.items() if name != "model"}


def test_headers_are_all_that_is_fetched(hub: Hub, folder: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add(NAME, {**files, "modeling_minicpmv.py": b"import os"})
    hub.store = hub.store_url
    here = plan_of(run(hub, tmp_path, str(folder)))
    assert not hub.requests, "a folder needs no network"
    far = plan_of(run(hub, tmp_path, NAME, HF_TOKEN="hf_secret"))
    assert far == here
    for name, content in files.items():
        sent = hub.sent.get(name, 0)
        if name.endswith(".safetensors"):
            assert 0 < sent <= 256 * 1024 < len(content), "more than a header's part"
        elif name == "tokenizer.json":
            assert sent == 0
    assert hub.sent.get("modeling_minicpmv.py", 0) == 0
    assert "Bearer hf_secret" in hub.authorizations
    assert hub.store_authorizations == {None}, "the token went to where the hub only keeps its files"
    assert not list((tmp_path / "hf").rglob("*.safetensors")), (
        "nothing of it is kept as if it were downloaded"
    )
    assert plan_of(run(hub, tmp_path, NAME, "--revision", COMMIT)) == here


def test_a_long_header_is_read_to_its_end_and_ranges_may_be_ignored(
    hub: Hub, folder: Path, tmp_path: Path, seed: int
) -> None:
    (name, *_) = sorted(path.name for path in folder.glob("*.safetensors"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    old = files[name]
    length = int.from_bytes(old[:8], "little")
    header = json.loads(old[8 : 8 + length])
    header["__metadata__"] = {"note": "x" * random.Random(seed).randint(300_000, 600_000)}
    longer = json.dumps(header).encode()
    files[name] = len(longer).to_bytes(8, "little") + longer + old[8 + length :]
    hub.add(NAME, files)
    here = plan_of(run(hub, tmp_path, str(folder)))
    assert plan_of(run(hub, tmp_path, NAME)) == here
    hub.ignores_ranges = True
    assert plan_of(run(hub, tmp_path, NAME)) == here


@pytest.fixture
def line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `plan` says where it fails, in this process."""
    from huggingface_hub import constants

    from huoyan.errors import ModelError
    from huoyan.planning.plan import plan

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)

    def said(name: str = NAME, **options: str) -> str:
        with pytest.raises(ModelError) as failed:
            plan(name, "2GiB", cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]
        message = str(failed.value)
        assert "\n" not in message
        return message

    return said


def test_what_goes_wrong_is_one_line(
    hub: Hub, folder: Path, line: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add(NAME, files)
    shards = [name for name in files if name.endswith(".safetensors")]
    assert "has no model someone/else" in line("someone/else")
    hub.gated.add(NAME)
    assert "accept its terms" in line()
    hub.gated.clear()
    hub.add(NAME, {**files, shards[0]: files[shards[0]][:-5]})
    assert "where its header promises" in line()
    hub.add(NAME, {**files, shards[0]: b"\xff" * 5000})
    assert "is not a safetensors file" in line()
    hub.add(
        NAME, {n: c for n, c in files.items() if "safetensors" not in n} | {"pytorch_model.bin": b"x" * 5000}
    )
    assert "pickled weights" in line()
    hub.add(NAME, {**files, "config.json": json.dumps({**CONFIG, "model_type": "llama"}).encode()})
    assert line().startswith(f"{NAME}/config.json says model_type 'llama'")
    index = json.dumps({"weight_map": {"a": "../../secret.safetensors"}}).encode()
    hub.add(NAME, {**files, "model.safetensors.index.json": index})
    assert "outside of its folder" in line()
    assert "only Hugging Face's headers" in line(hub="modelscope")
    hub.fail_with = 429
    assert "too many requests" in line()
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "switched off" in line()
    assert not hub.requests
