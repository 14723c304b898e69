"""How the decoder's kernels are launched; or noted instead, and compiled side by side.

A start captures some forty graphs, whose kernels are cut in as many ways as there are sizes. Where they were never
compiled, each is compiled when it is first launched, one after the other. So before that a start goes through a few
layers of each size without launching anything, and has threads compile what would have been.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

log = logging.getLogger(__name__)

Job = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments, its options."""


class NotedLaunches:
    """Launches that would be compiled differently, once each, by arguments that stand for the real ones: nothing that
    a step works with is held."""

    def __init__(self) -> None:
        self._jobs: dict[Any, Job] = {}
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def note(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        stand_ins, kinds = zip(*map(self._stand_in, arguments), strict=True)
        key = kernel, kinds, tuple(sorted(options.items()))
        self._jobs.setdefault(key, (kernel, stand_ins, options))

    def compile(self, device: torch.device) -> None:
        """Side by side, by as many threads as there are cores. What fails is compiled where it is launched, which
        tells why."""

        def safely(job: Job) -> None:
            try:
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    _compile(job)
            except Exception as error:
                log.debug("%s is not compiled ahead: %s", job[0], str(error).splitlines()[:1])

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(safely, self._jobs.values()))

    def _stand_in(self, argument: Any) -> tuple[Any, Any]:
        """(what is compiled alike, what it is known by)."""
        if isinstance(argument, Tensor):
            aligned = argument.data_ptr() % 16 == 0
            memory = self._few(argument)
            return memory if aligned else memory[1:], (argument.dtype, aligned)
        if isinstance(argument, TensorDescriptor):
            block = tuple(argument.block_shape)
            # Shapes and strides are no part of what is compiled.
            stand_in = TensorDescriptor(
                self._few(argument.base), list(argument.shape), list(argument.strides), list(block)
            )
            return stand_in, (TensorDescriptor, argument.base.dtype, block)
        if type(argument) is int and not 0 <= argument <= 1:
            # Numbers are told apart by whether they are multiples of 16, and by their width.
            large = 0 if -(2**31) <= argument < 2**31 else 2**40
            return (whole := large + (16 if argument % 16 == 0 else 17)), whole
        return argument, (type(argument), argument)

    def _few(self, like: Tensor) -> Tensor:
        key = like.dtype, like.device
        if key not in self._memory:
            self._memory[key] = torch.zeros(64, dtype=like.dtype, device=like.device)
        return self._memory[key]


class _Noting(threading.local):
    now: NotedLaunches | None = None


_noting = _Noting()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`, or a note of it."""
    noted = _noting.now
    if noted is None:
        kernel[grid](*arguments, **options)
    else:
        noted.note(kernel, arguments, options)


@contextmanager
def noted_launches() -> Iterator[NotedLaunches]:
    """What this thread would launch by `launch` meanwhile is noted only; its results are whatever memory holds."""
    noted = NotedLaunches()
    with _said(noted):
        yield noted


def launched() -> Any:
    """A context in which launches are launches again."""
    return _said(None)


@contextmanager
def _said(noted: NotedLaunches | None) -> Iterator[None]:
    before, _noting.now = _noting.now, noted
    try:
        yield
    finally:
        _noting.now = before


def _compile(job: Job) -> None:
    kernel, arguments, options = job
    compiled = kernel.warmup(*arguments, grid=(1, 1, 1), **options)
    # Asked for, it is loaded, and its launcher made, which some versions of Triton have a C compiler do.
    getattr(compiled, "run", None)
