"""Drive a backend from the calling thread: prepare requests in a pool, feed them in, hand outputs on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from huoyan.api.outputs import RequestOutput
from huoyan.errors import CapacityError, HuoyanError, InputError

if TYPE_CHECKING:
    from huoyan.api.prompts import Prompt
    from huoyan.api.runtime import Runtime
    from huoyan.api.sampling_params import SamplingParams
    from huoyan.backends.base import Backend
    from huoyan.engine.request import EngineRequest

logger = logging.getLogger(__name__)

AHEAD = 16
"""Requests whose pictures may be ready before the engine asks: some tens of megabytes of pixels."""


@dataclass(frozen=True)
class Job:
    """One request to run. An `error` found while reading it becomes its output."""

    request_id: str
    prompt: Prompt | None
    params: SamplingParams | None
    error: HuoyanError | None = None


def default_workers() -> int:
    """Threads that prepare requests: a core is left to the engine, which all of them wait for."""
    return max(1, min(8, (os.cpu_count() or 1) - 1))


def drive(
    runtime: Runtime,
    jobs: Iterable[Job | None],
    pool: Executor,
    *,
    concurrency: int | None = None,
    raise_errors: bool = False,
    streamed: bool = True,
    in_bulk: bool = False,
) -> Iterator[RequestOutput]:
    """Run `jobs` and yield their outputs as the backend gives them; a job's last one is `finished`.

    Without `streamed` the last ones are enough for the caller; a backend may make no others. `in_bulk`: they are so
    few that all can run at once, and what counts is when the last one is done.

    `jobs` is read as far as there is room: `concurrency` requests at once (None: what the engine batches and
    some ahead). A None in it says that there is nothing for now and that it is to be asked again. With
    `raise_errors`, the first request that is wrong ends the run with its error.

    However the iteration ends (closed, interrupted, a failing backend), nothing of it stays in the backend.
    Ctrl-C takes effect between two steps, so that the backend is never left in the middle of one.
    """
    waiting = iter(jobs)
    more = True
    preparing: dict[Future[EngineRequest], Job] = {}
    running: set[str] = set()
    limit = concurrency or runtime.options.max_num_seqs + AHEAD
    try:
        while more or preparing or running:
            while more and len(preparing) < AHEAD and len(preparing) + len(running) < limit:
                try:
                    job = next(waiting)
                except StopIteration:
                    more = False
                    break
                if job is None:
                    break
                if job.error is not None or job.prompt is None or job.params is None:
                    yield _failed(job.request_id, job.error, raise_errors)
                    continue
                future = pool.submit(runtime.frontend.prepare, job.request_id, job.prompt, job.params)
                preparing[future] = job
                if not future.done():
                    # Or a backend that waits for a step would get it a step late.
                    future.add_done_callback(lambda _: runtime.backend.wake())
            for future in _ready(preparing, block=not running):
                job = preparing.pop(future)
                running.add(job.request_id)
                try:
                    request = future.result()
                    request.streamed, request.in_bulk = streamed, in_bulk
                    with between_steps():
                        runtime.backend.add_request(request)
                except HuoyanError as error:
                    running.discard(job.request_id)
                    yield _failed(job.request_id, error, raise_errors)
                except Exception as bug:
                    # A bug that one picture brings out must not cost a long run its other answers.
                    running.discard(job.request_id)
                    if raise_errors:
                        raise
                    logger.exception("preparing request %s failed", job.request_id)
                    message = f"internal error, please report it: {type(bug).__name__}: {bug}"
                    yield _failed(job.request_id, HuoyanError(message), False)
            if running:
                with between_steps():
                    outputs = step(runtime.backend)
                for output in outputs:
                    if output.request_id not in running:
                        continue
                    if output.error is not None and raise_errors:
                        raise HuoyanError(output.error)
                    if output.finished:
                        running.discard(output.request_id)
                    yield output
    finally:
        for future in preparing:
            future.cancel()
        for request_id in running:
            # Where the backend itself has failed, its own error is the one to show.
            with contextlib.suppress(Exception):
                runtime.backend.abort_request(request_id)


def step(backend: Backend) -> list[RequestOutput]:
    """One step; memory running out becomes one line."""
    try:
        return backend.step()
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise CapacityError(
                "the device ran out of memory: lower gpu_memory_utilization or max_num_seqs, "
                "or use an int4 checkpoint"
            ) from error
        raise


def _failed(request_id: str, error: HuoyanError | None, raise_error: bool) -> RequestOutput:
    """The output of a request that was itself wrong."""
    error = error or InputError("the request is empty")
    if raise_error:
        raise error
    return RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=[],
        outputs=[],
        finished=True,
        error=str(error),
    )


def _ready(preparing: dict[Future[EngineRequest], Job], block: bool) -> list[Future[EngineRequest]]:
    """Those that are done, in the order they were asked for; where `block`, at least one."""
    done = [future for future in preparing if future.done()]
    if done or not block or not preparing:
        return done
    finished, _ = wait(preparing, return_when=FIRST_COMPLETED)
    return [future for future in preparing if future in finished]


@contextlib.contextmanager
def between_steps() -> Iterator[None]:
    """Put Ctrl-C off until the block is left; a second one is not put off."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    asked = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt
