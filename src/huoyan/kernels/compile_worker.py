"""The other end of `compile_helper`: `python -m huoyan.kernels.compile_worker PROCESSES`, target and jobs on its input.

It imports once and then parts into so many processes, each of which takes the next job that nobody
has, and says its number when the kernel is on the disk. None of them has to do with the device.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from huoyan.kernels.first_use import read_triton
from huoyan.kernels.jobs import compiled, read_job

_NUMBER = struct.Struct("<I")


class _Driver:
    """What compiling asks of a device's driver."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self.launcher_cls: Any = None
        with contextlib.suppress(ImportError):
            from triton.backends.nvidia.driver import CudaLauncher

            self.launcher_cls = CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_job(line: str) -> None:
    """Compile it, and the launcher where Triton has one for each kernel; see `huoyan.kernels.jobs`."""
    kernel = compiled(read_job(line))
    # Its launcher comes first, then what needs the device.
    with contextlib.suppress(Exception):
        getattr(kernel, "run", None)


def main() -> None:
    # A second of work, once for all.
    read_triton()
    lines = sys.stdin.read().splitlines()
    if not lines:
        return
    triton.runtime.driver.set_active(_Driver(GPUTarget(*json.loads(lines[0]))))
    numbered = [line.split(" ", 1) for line in lines[1:]]
    reading, writing = os.pipe()
    os.write(writing, b"".join(map(_NUMBER.pack, range(len(numbered)))))
    os.close(writing)
    children = []
    for _ in range(min(int(sys.argv[1]), len(numbered))):
        child = os.fork()
        if child == 0:
            _work(reading, numbered)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _work(queue: int, numbered: list[list[str]]) -> None:
    # So few bytes are read whole or not at all.
    while some := os.read(queue, _NUMBER.size):
        number, job = numbered[_NUMBER.unpack(some)[0]]
        # What fails is left to the process that wants it, which tells why.
        with contextlib.suppress(Exception):
            compile_job(job)
            os.write(sys.stdout.fileno(), f"{number}\n".encode())


if __name__ == "__main__":
    main()
