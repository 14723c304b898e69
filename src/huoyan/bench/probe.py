"""How fast this device reads and computes, measured now: what the limits beside the rows are computed from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from huoyan.models.costs import Speed

MIB = 1 << 20
_SECONDS = 0.15
_MOST = {"cuda": 2048 * MIB}
_MOST_ELSEWHERE = 256 * MIB
_SIDE = {"cuda": 8192}
_SIDE_ELSEWHERE = 2048


@dataclass(frozen=True)
class Probe:
    """Bytes a second of a copy (read and written) and of a matrix-vector product (read), operations a second of a
    product of square matrices."""

    copy: float
    matvec: float
    matmul: float

    @property
    def speed(self) -> Speed:
        """What limits are computed with: the better of the two ways to move bytes."""
        return Speed(max(self.copy, self.matvec), self.matmul)

    def line(self) -> str:
        return (
            f"this device, just now: a copy moves {self.copy / 1e9:.1f} GB/s, a matrix-vector product reads "
            f"{self.matvec / 1e9:.1f} GB/s, a matrix product computes {self.matmul / 1e12:.3g} TFLOP/s"
        )


def probe(device: torch.device, dtype: torch.dtype, nbytes: int, seconds: float = _SECONDS) -> Probe:
    """Measure for about three times `seconds`.

    Args:
        nbytes: what a decode step of the model reads: a model that stays in a cache is held against the cache.
    """
    most = _MOST.get(device.type, _MOST_ELSEWHERE)
    if device.type == "cuda":
        most = min(most, torch.cuda.mem_get_info(device)[0] // 4)
    nbytes = max(min(nbytes, most), MIB)
    values = nbytes // dtype.itemsize
    source = torch.ones(values, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best_seconds(partial(target.copy_, source), device, seconds)
    del target
    width = 2048 if values >= 2048 * 16 else 256
    matrix = source[: values // width * width].view(-1, width)
    vector = torch.ones(width, 1, dtype=dtype, device=device)
    matvec = matrix.nbytes / best_seconds(partial(torch.mm, matrix, vector), device, seconds)
    del matrix, source
    return Probe(copy, matvec, _matmul(device, dtype, seconds))


def _matmul(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """From small squares on, as long as they do not take too long: some dtypes are slow on some CPUs."""
    best, side = 0.0, 512
    while True:
        square = torch.full((side, side), 1 / side, dtype=dtype, device=device)
        took = best_seconds(partial(torch.mm, square, square), device, seconds)
        best = max(best, 2 * side**3 / took)
        side *= 2
        if side > _SIDE.get(device.type, _SIDE_ELSEWHERE) or took * 8 > 2 * seconds:
            return best


def best_seconds(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of the runs that fit into `seconds`, three at least."""
    run()
    synchronize(device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begun = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
