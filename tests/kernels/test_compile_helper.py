"""Kernels compiled by processes beside ours."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from huoyan.kernels import add_rms_norm, compile_helper
from huoyan.kernels.compile_helper import CompileHelper
from huoyan.kernels.jobs import read_job, write_job

TARGET = ("cuda", 90, 32)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Processes that are started compile, into a new folder."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_a_job_is_read_as_it_was_written() -> None:
    memory = torch.zeros(64, dtype=torch.float16)
    described = TensorDescriptor(memory, [4, 16], [16, 1], [2, 16])
    arguments = (memory, memory[1:], described, 17, 2**40, 1, True, None, 0.5, "x")
    line = write_job((add_rms_norm._kernel, arguments, {"num_warps": 4, "launch_pdl": True}))
    assert line is not None
    assert "\n" not in line
    kernel, got, options = read_job(line)
    assert kernel is add_rms_norm._kernel
    assert options == {"num_warps": 4, "launch_pdl": True}
    assert [got[i].dtype for i in (0, 1)] == [torch.float16] * 2
    assert [got[i].data_ptr() % 16 == 0 for i in (0, 1)] == [True, False]
    assert (got[2].base.dtype, got[2].shape, got[2].strides, got[2].block_shape) == (
        torch.float16, [4, 16], [16, 1], [2, 16],
    )  # fmt: skip
    assert got[3:] == arguments[3:]
    assert [type(value) for value in got[3:]] == [type(value) for value in arguments[3:]]


def test_what_text_cannot_say_is_left_out() -> None:
    assert write_job((add_rms_norm._kernel, (object(),), {})) is None
    assert write_job((add_rms_norm._kernel, (1,), {"num_warps": object()})) is None


@pytest.mark.parametrize(
    "line", ["", "[]", '["os", "system", [["value", "true"]], {}]', '["huoyan.kernels.nothing", "x", [], {}]']
)
def test_what_is_no_job_is_refused(line: str) -> None:
    with pytest.raises((ValueError, ImportError)):
        read_job(line)


def test_what_it_compiles_is_what_a_launch_takes(compiles: Path) -> None:
    script = Path(__file__).with_name("helped.py")
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    noted, hits, misses = map(int, ran.stdout.split())
    assert noted == hits > 50
    assert misses == 0


def test_what_cannot_be_compiled_is_not_said(compiles: Path) -> None:
    memory = torch.zeros(64)
    arguments = (memory, memory, memory, memory, memory, 64, 1e-6)
    helper = CompileHelper()
    try:
        jobs = [None, "[]", write_job((add_rms_norm._kernel, arguments, {"NO_SUCH": 1}))]
        assert list(helper.compile(jobs, TARGET)) == []
    finally:
        helper.close()


def test_a_process_that_dies_or_is_silent_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_helper, "SILENCE", 0.2)
    begun = time.monotonic()
    for program in ("pass", "import time; print(0, flush=True); time.sleep(60)"):
        path = compile_helper.subprocess.Popen

        def other(command: list[str], program: str = program, path: type = path, **more: object) -> object:
            return path([command[0], "-c", program], **more)

        with monkeypatch.context() as patched:
            patched.setattr(compile_helper.subprocess, "Popen", other)
            helper = CompileHelper()
        # More than a pipe holds.
        got = list(helper.compile(["x" * 100_000] * 10, TARGET))
        helper.close()
        assert got in ([], [0])
        assert helper._process.returncode is not None
    assert time.monotonic() - begun < 30


def test_an_end_ends_all_of_its_processes(compiles: Path) -> None:
    helper = CompileHelper()
    group = helper._process.pid
    helper.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)
