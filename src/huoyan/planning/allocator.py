"""What torch's CUDA allocator reserves for tensors that stay: more than they have, as it hands out whole segments.

Sizes as in PyTorch's c10/cuda/CUDACachingAllocator.cpp: requests are rounded to 512 bytes; up to 1 MiB they share
segments of 2 MiB, up to 10 MiB segments of 20 MiB, and larger ones get a segment of their own, rounded to 2 MiB.
What is left of a segment serves later requests of its kind.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from huoyan.planning.sizes import MIB

_SMALL = MIB
_OWN_SEGMENT = 10 * MIB


def reserved_bytes(sizes: Iterable[int]) -> int:
    """Bytes of all segments after tensors of `sizes` bytes were made in this order."""
    free: dict[bool, list[int]] = {True: [], False: []}
    total = 0
    for size in sizes:
        if size <= 0:
            continue
        wanted = -(-size // 512) * 512
        small = wanted <= _SMALL
        rooms = free[small]
        at = bisect_left(rooms, wanted)
        if at < len(rooms):
            room = rooms.pop(at)
        else:
            room = 2 * MIB if small else 20 * MIB
            if wanted >= _OWN_SEGMENT:
                room = -(-wanted // (2 * MIB)) * 2 * MIB
            total += room
        left = room - wanted
        if left >= 512 if small else left > _SMALL:
            insort(rooms, left)
    return total
