"""A process beside ours that compiles kernels, on all cores.

Threads cannot: part of compiling holds the interpreter's lock, so that sixteen cores give what four would. The process
is started before anything else is, and has imported what it needs when the first kernel is known. What it compiles is
found in Triton's cache on the disk, as what an earlier process had compiled would be; should it fail, nothing is there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator

from huoyan.cores import usable_cores

log = logging.getLogger(__name__)

SILENCE = 60.0
"""Seconds without a kernel after which it is given up: importing takes some, the largest kernel one or two."""
_MOST = 16
"""Processes: each has some forty MiB of its own, and there are no more than eighty kernels."""


class CompileHelper:
    """One start's. `compile` once, then `close`."""

    def __init__(self) -> None:
        """Start it. Raises OSError where that cannot be."""
        # It finds what we have found, and has nothing to do with the device.
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "huoyan.kernels.compile_worker", str(min(usable_cores(), _MOST))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # All that it parts into is ended together, and by nobody else.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )

    def compile(self, jobs: Iterable[str | None], target: tuple[str, int, int]) -> Iterator[int]:
        """The numbers of `jobs` (see `huoyan.kernels.jobs`; None is left out) as they are compiled for `target`
        (backend, architecture, threads of a warp). Those that fail are not among them."""
        lines = [json.dumps(target), *(f"{i} {job}" for i, job in enumerate(jobs) if job is not None)]
        # Aside, so that a process that reads nothing holds nobody up.
        threading.Thread(target=self._send, args=("\n".join(lines) + "\n",), daemon=True).start()
        try:
            yield from self._numbers()
        except (OSError, ValueError) as error:
            log.debug("the process that compiles kernels is left: %s", error)

    def close(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _send(self, text: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError, ValueError):
            pipe.write(text.encode())
            pipe.close()

    def _numbers(self) -> Iterator[int]:
        pipe = self._process.stdout
        assert pipe is not None
        rest = b""
        while select.select([pipe], [], [], SILENCE)[0]:
            some = os.read(pipe.fileno(), 1 << 16)
            if not some:
                return
            *whole, rest = (rest + some).split(b"\n")
            yield from map(int, whole)
        log.debug("the process that compiles kernels said nothing for %d seconds", SILENCE)
