"""What torch's CUDA allocator reserves for tensors that stay: more than they have, as it hands out whole segments.

Sizes as in PyTorch's c10/cuda/CUDACachingAllocator.cpp: requests are rounded to 512 bytes; up to 1 MiB they share
segments of 2 MiB, up to 10 MiB segments of 20 MiB, and larger ones get a segment of their own, rounded to 2 MiB.
What is left of a segment serves later requests of its kind. Segments that grow ("expandable_segments") have no ends
inside: one for small and one for large requests, in steps of 2 and 20 MiB.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Iterable

from huoyan.planning.sizes import MIB

_SMALL = MIB
_OWN_SEGMENT = 10 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch's own variables; what somebody has set there stays."""
GROWING = "expandable_segments:True"


def grows() -> bool:
    """Whether the engine lets segments grow: unless torch's variables say something."""
    said = [os.environ[name] for name in _SETTINGS if os.environ.get(name)]
    return not said or any(GROWING.lower() in text.lower() for text in said)


def whole_segments(size: int) -> int:
    """What a pool of memory has whose tensors take `size` bytes at their fullest, a few small ones among them."""
    return -(-size // LARGE_SEGMENT) * LARGE_SEGMENT + 3 * SMALL_SEGMENT if size else 0


def reserved_bytes(sizes: Iterable[int], *, growing: bool = False) -> int:
    """Bytes of all segments after tensors of `sizes` bytes were made in this order."""
    if growing:
        small = large = 0
        for size in sizes:
            wanted = -(-size // 512) * 512
            if wanted <= _SMALL:
                small += wanted
            else:
                large += wanted
        return -(-small // SMALL_SEGMENT) * SMALL_SEGMENT + -(-large // LARGE_SEGMENT) * LARGE_SEGMENT
    free: dict[bool, list[int]] = {True: [], False: []}
    total = 0
    for size in sizes:
        if size <= 0:
            continue
        wanted = -(-size // 512) * 512
        is_small = wanted <= _SMALL
        rooms = free[is_small]
        at = bisect_left(rooms, wanted)
        if at < len(rooms):
            room = rooms.pop(at)
        else:
            room = SMALL_SEGMENT if is_small else LARGE_SEGMENT
            if wanted >= _OWN_SEGMENT:
                room = -(-wanted // (2 * MIB)) * 2 * MIB
            total += room
        left = room - wanted
        if left >= 512 if is_small else left > _SMALL:
            insort(rooms, left)
    return total
