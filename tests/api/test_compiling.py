"""Who compiles the kernels of a start."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from huoyan.api import compiling
from huoyan.api.options import EngineOptions
from huoyan.kernels import compile_helper


class Helper:
    running = 0

    def __init__(self) -> None:
        Helper.running += 1

    def close(self) -> None:
        Helper.running -= 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a card and many cores, where nothing was compiled."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(compiling, "_DEVICES", (str(tmp_path),))
    monkeypatch.setattr(compiling, "decode_kernels_enabled", lambda: True)
    monkeypatch.setattr(compiling, "usable_cores", lambda: 16)
    monkeypatch.setattr(compile_helper, "CompileHelper", Helper)
    return tmp_path


def started(folder: Path, **options: Any) -> bool:
    with compiling.helper_for(EngineOptions("m", **options), folder) as helper:
        assert Helper.running == (helper is not None)
    assert not Helper.running
    return helper is not None


def test_the_first_start_of_its_kind_has_one(folder: Path) -> None:
    assert started(folder)
    assert not started(folder)
    assert started(folder, max_num_seqs=7)
    assert started(folder, dtype="float16")
    (folder / "config.json").write_text('{"other": 1}')
    assert started(folder)
    assert not started(folder, seed=3)


def test_a_start_that_failed_does_not_count(folder: Path) -> None:
    with pytest.raises(RuntimeError), compiling.helper_for(EngineOptions("m"), folder):
        raise RuntimeError("no memory")
    assert not Helper.running
    assert started(folder)


@pytest.mark.parametrize(
    "options",
    [{"enforce_eager": True}, {"capture_at_start": False}, {"device": "cpu"}, {"engine": "vllm"}],
)
def test_there_is_none_where_nothing_is_captured(folder: Path, options: dict[str, Any]) -> None:
    assert not started(folder, **options)


def test_there_is_none_without_a_card_cores_kernels_or_python(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name, value in (
        (compiling, "_DEVICES", (str(folder / "nothing"),)),
        (compiling, "decode_kernels_enabled", lambda: False),
        (compiling, "usable_cores", lambda: 2),
        (sys, "executable", ""),
        (sys, "frozen", True),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, value, raising=False)
            assert not started(folder)


def test_where_processes_or_files_cannot_be_the_start_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kept in (folder / "config.json", folder / ("x" * 300)):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(kept))
        assert started(folder)
        assert started(folder)

    def fails() -> SimpleNamespace:
        raise OSError("no more processes")

    monkeypatch.setattr(compile_helper, "CompileHelper", fails)
    assert not started(folder)


def test_the_mark_lies_beside_what_triton_keeps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value, place in (
        ("TRITON_HOME", folder / "a", folder / "a/.triton/cache"),
        ("HOME", folder / "b", folder / "b/.triton/cache"),
    ):
        with monkeypatch.context() as patched:
            patched.delenv("TRITON_CACHE_DIR")
            patched.delenv("TRITON_HOME", raising=False)
            patched.setenv(variable, str(value))
            assert started(folder)
            assert len(list(place.glob("huoyan-*"))) == 1
