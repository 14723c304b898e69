"""How the kernels are launched; or noted instead, and compiled side by side.

A start captures some forty graphs, whose kernels are cut in as many ways as there are sizes. Where they were never
compiled, each is compiled when it is first launched, one after the other. So before that a start goes through a few
layers of each size without launching anything, and has what would have been compiled by helper processes, or threads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from huoyan.cores import usable_cores
from huoyan.kernels.compile_helper import CompileHelper
from huoyan.kernels.jobs import Job, compiled, write_job

log = logging.getLogger(__name__)

_THREADS = 8
"""More of them are in each other's way: part of compiling holds the interpreter's lock."""


class NotedLaunches:
    """Launches that would be compiled differently, once each, by arguments that stand for the real ones: nothing that
    a step works with is held."""

    def __init__(self) -> None:
        self._jobs: dict[Any, Job] = {}
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def note(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        stand_ins, kinds = self._stand_ins(kernel, arguments)
        key = kernel, kinds, tuple(sorted(options.items()))
        self._jobs.setdefault(key, (kernel, stand_ins, options))

    def compile(self, device: torch.device, helper: CompileHelper | None = None) -> None:
        """Side by side, for `device`: by the helper's processes, where there is one, and by threads, which take what
        it leaves and load what it gives. What fails is compiled where it is launched, which tells why."""

        def safely(job: Job) -> None:
            try:
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    _compile(job)
            except Exception as error:
                log.debug("%s is not compiled ahead: %s", job[0], str(error).splitlines()[:1])

        jobs = list(self._jobs.values())
        left = dict.fromkeys(range(len(jobs)))
        with ThreadPoolExecutor(min(usable_cores(), _THREADS)) as pool:
            for number in helper.compile(map(write_job, jobs), _target()) if helper is not None else ():
                if number in left:
                    del left[number]
                    pool.submit(safely, jobs[number])
            for number in left:
                pool.submit(safely, jobs[number])

    def _stand_ins(self, kernel: Any, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        # Where Triton interprets, nothing is compiled, and there are no parameters to ask.
        places = getattr(kernel, "params", None) or [None] * len(arguments)
        both = [self._stand_in(argument, place) for argument, place in zip(arguments, places, strict=False)]
        return tuple(stand_in for stand_in, _ in both), tuple(kind for _, kind in both)

    def _stand_in(self, argument: Any, place: Any) -> tuple[Any, Any]:
        """(what is compiled alike, what it is known by). `place`: Triton's word on the parameter."""
        alike = place is not None and place.do_not_specialize
        if isinstance(argument, Tensor):
            aligned = argument.data_ptr() % 16 == 0
            if alike or (place is not None and place.do_not_specialize_on_alignment):
                aligned = False
            memory = self._few(argument)
            return memory if aligned else memory[1:], (argument.dtype, aligned)
        if isinstance(argument, TensorDescriptor):
            block = tuple(argument.block_shape)
            # Shapes and strides are no part of what is compiled.
            stand_in = TensorDescriptor(
                self._few(argument.base), list(argument.shape), list(argument.strides), list(block)
            )
            return stand_in, (TensorDescriptor, argument.base.dtype, block)
        if type(argument) is int and (alike or not 0 <= argument <= 1):
            # Numbers are told apart by whether they are multiples of 16, and by their width.
            large = 0 if -(2**31) <= argument < 2**31 else 2**40
            return (whole := large + (16 if argument % 16 == 0 and not alike else 17)), whole
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


def launches_are_noted() -> bool:
    """Whether nothing that this thread launches runs, so that results tell nothing."""
    return _noting.now is not None


@contextmanager
def noted_launches() -> Iterator[NotedLaunches]:
    """What this thread would launch by `launch` meanwhile is noted only; its results are whatever memory holds."""
    before, _noting.now = _noting.now, NotedLaunches()
    try:
        yield _noting.now
    finally:
        _noting.now = before


def _target() -> tuple[str, int, int]:
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch, target.warp_size


def _compile(job: Job) -> None:
    # Asked for, it is loaded, and its launcher made, which some versions of Triton have a C compiler do.
    getattr(compiled(job), "run", None)
