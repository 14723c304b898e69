"""How products with int4 matrices are cut, and which of them are the int4 kernel's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from huoyan.kernels.int4_words import BLOCK
from huoyan.kernels.processors import PUBLISHED
from huoyan.planning.pieces import FEW_ROWS, INT4_PARTS_ROWS, INT4_ROWS

_LARGE = 16384
"""Outputs that are many rounds of programs, whatever the rows."""


@dataclass(frozen=True)
class Tuning:
    """How one shape is cut: outputs and rows of a program, programs that share the inputs, blocks fetched ahead of the
    wait; whether weights are scaled before they are multiplied, and not their sums."""

    block_n: int
    split: int
    warps: int
    stages: int
    prefetch: int = 0
    block_m: int = 16
    scaled: bool = False
    tiles: bool = False
    """Rows come by the tensor memory unit (Hopper): no addresses of theirs in registers, no masks."""
    registers: int | None = None
    """The most a thread may have, so that as many programs fit a processor as shared memory allows."""
    wave: int = 0
    """Programs a processor has room for at a time: tiles that do not fill the last round are shared out, see `tail`."""
    tail: int = 1
    """Programs that share the inputs of a tile of the last round; the last to come adds their sums, always in the same
    order."""


def takes(rows: int, n: int, k: int, device: torch.device) -> bool:
    """Whether the int4 kernel is the way of so many rows through a matrix of n outputs and k inputs, and not cuBLAS's
    product with it made dense (measured on an H100: see benchmarks/NOTES.md)."""
    if rows <= FEW_ROWS:
        return True
    if not is_roomy(device):
        return False
    if n >= _LARGE:
        return rows <= INT4_ROWS
    return rows <= (INT4_ROWS if k >= 2 * n else 576 if k >= n else 384)


@lru_cache(maxsize=2048)
def choose(m: int, n: int, k: int, parts: bool = False, roomy: bool = True) -> Tuning:
    """How a product is cut (searched, each cut in its place in a step, by `benchmarks/decode_step.py`).

    `parts`: whether inputs may be shared out among programs whose sums the next kernel adds; `roomy`: see `is_roomy`.
    """
    # Whole tiles of 64; fewer rows would leave some that are not full.
    if m > FEW_ROWS or (m == FEW_ROWS and roomy):
        return _choose_hundreds(m, n, parts)
    if m > 128 or (m > 16 and not roomy):
        split = max(1, min(k // BLOCK // 4, 7 if m <= 64 else 4)) if parts and n < _LARGE else 1
        if split == 1 or n > k:
            return Tuning(64, split, warps=4, stages=3, block_m=64)
        return Tuning(128, split, warps=4, stages=4, block_m=64)
    if m > 16:
        return _choose_few(n, k, parts) if m <= 32 else _choose_many(m <= 64, n, k, parts)
    if n >= _LARGE:
        return Tuning(128, 1, warps=4, stages=4, prefetch=4)
    if not parts:
        return Tuning(64, 1, warps=4, stages=4, prefetch=4)
    # A program for each processor and more; what reads the parts reads few outputs of each.
    split = max(1, min(k // BLOCK // 4, 7 if k < 8192 else 14))
    return Tuning(128, split, warps=4, stages=4, prefetch=4)


def _choose_few(n: int, k: int, parts: bool) -> Tuning:
    """Of 17 to 32 rows, where shared memory has room for three stages of them."""
    few = partial(Tuning, block_m=32, scaled=True, tiles=True)
    if n >= _LARGE:
        return few(64, 1, 4, 3, prefetch=4, wave=4, tail=4)
    if not parts:
        return few(64, 1, 4, 3)
    most = max(1, k // BLOCK // 4)
    if n > k:
        return few(128, min(7, most), 8, 3)
    return few(64, min(9 if k >= 8192 else 7, most), 4, 4, prefetch=4)


def _choose_many(few: bool, n: int, k: int, parts: bool) -> Tuning:
    """Of 33 to 64 rows, or else to 128."""
    whole = partial(Tuning, block_m=64 if few else 128, scaled=True, tiles=True)
    if n >= _LARGE:
        # As many programs at a time as there is room for, and the last round shared out.
        return (
            whole(128, 1, 8, 4, wave=2, tail=4)
            if few
            else whole(128, 1, 8, 2, prefetch=4, registers=128, wave=2, tail=4)
        )
    if not parts:
        return whole(64, 1, 4, 3 if few else 2)
    most = max(1, k // BLOCK // 4)
    if n > k:
        return whole(64, min(4, most), 4, 3 if few else 2, prefetch=4)
    if few:
        return whole(64, min(7, most), 4, 3, prefetch=4 if k >= 8192 else 0)
    return whole(128, min(4, most), 4, 3)


def _choose_hundreds(m: int, n: int, parts: bool) -> Tuning:
    """Of more rows: inputs are shared out where that fills the rounds of programs."""
    # A tile that reaches beyond the rows takes longer than a whole one.
    block_m, at_a_time = (64, 3 * PUBLISHED) if 0 < m % 128 <= 64 else (128, 2 * PUBLISHED)
    tiles = -(-n // 64) * -(-m // block_m)

    def rounds(split: int) -> float:
        return -(-tiles * split // at_a_time) / split

    splits = range(1, max(1, min(3, INT4_PARTS_ROWS // m)) + 1) if parts and n < _LARGE else (1,)
    return Tuning(64, min(splits, key=rounds), warps=4, stages=3, block_m=block_m, scaled=True, tiles=True)


@lru_cache(maxsize=16)
def is_roomy(device: torch.device) -> bool:
    """Whether a program may have more than 100 KiB of shared memory, and tiles by the tensor memory unit: data centres'
    GPUs from Hopper on; the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
