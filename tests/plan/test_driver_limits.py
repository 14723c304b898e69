"""The stack limit and cuBLAS's workspace are made smaller where nobody has set them, and stay in every other case."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Any

import pytest
import torch

from huoyan.engine import driver_limits
from huoyan.planning import driver
from huoyan.planning.memory import CUBLAS_OURS, CUBLAS_TORCHS, CUBLAS_VARIABLE, cublas_bytes
from huoyan.planning.sizes import MIB
from huoyan.planning.workspace import Way

CUDA = torch.device("cuda")


class FakeDriver:
    def __init__(self, limit: int, code: int = 0) -> None:
        self.limit, self.code = limit, code

    def cuCtxGetLimit(self, into: Any, which: int) -> int:
        assert which == 0
        into._obj.value = self.limit
        return self.code

    def cuCtxSetLimit(self, which: int, value: ctypes.c_size_t) -> int:
        assert which == 0
        self.limit = value.value
        return 0


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(driver.STACK_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)


def lowered(monkeypatch: pytest.MonkeyPatch, fake: FakeDriver) -> tuple[int, bool]:
    monkeypatch.setattr(driver_limits, "_driver", lambda: fake)
    driver_limits.lower_stack_limit(CUDA)
    return fake.limit, driver_limits.stack_limit_is_low(CUDA)


def test_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lowered(monkeypatch, FakeDriver(1024)) == (driver.STACK_BYTES, True)


def test_a_limit_that_was_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lowered(monkeypatch, FakeDriver(8192)) == (8192, False)
    assert lowered(monkeypatch, FakeDriver(64)) == (64, True)


def test_a_driver_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lowered(monkeypatch, FakeDriver(1024, code=1)) == (1024, False)

    def no_driver() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver_limits, "_driver", no_driver)
    driver_limits.lower_stack_limit(CUDA)
    assert not driver_limits.stack_limit_is_low(CUDA)


@pytest.mark.parametrize(
    ("said", "limit"), [("", 256), ("128", 128), ("0", 0), ("keep", None), ("4096", None)]
)
def test_the_variable(said: str, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(driver.STACK_VARIABLE, said)
    monkeypatch.setattr(driver, "STACKS_GIVEN_BACK", 7)
    assert driver.stack_limit() == limit
    assert driver.context_bytes() == driver.CUDA_CONTEXT - (0 if limit is None else 7)
    found, low = lowered(monkeypatch, FakeDriver(1024))
    assert (found, low) == ((1024, False) if limit is None else (limit, True))


def test_a_cpu_has_none() -> None:
    driver_limits.lower_stack_limit(torch.device("cpu"))


@pytest.mark.parametrize("in_use", [True, False])
def test_cublas_is_told_before_it_is_used_and_a_late_engine_says_what_it_has(
    in_use: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setenv(CUBLAS_VARIABLE, "")
    driver_limits.limit_cublas(torch.device("cpu"))
    assert os.environ[CUBLAS_VARIABLE] == ""
    driver_limits.limit_cublas(CUDA)
    assert os.environ[CUBLAS_VARIABLE] == (CUBLAS_TORCHS if in_use else CUBLAS_OURS)
    assert cublas_bytes(Way(itemsize=2, cuda=True)) == 2 * (32 if in_use else 8) * MIB
    monkeypatch.setenv(CUBLAS_VARIABLE, ":4096:1")
    driver_limits.limit_cublas(CUDA)
    assert os.environ[CUBLAS_VARIABLE] == ":4096:1"
