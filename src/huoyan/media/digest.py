"""Digests of pictures' pixels, by all cores: for one core hashing a large picture takes longer than resizing it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

DIGEST_BYTES = 16
LEAF = 1 << 19
"""Bytes that are hashed at a time; part of what the digest is, so that it is the same on every machine."""


def digests_of(pictures: Sequence[tuple[bytes, memoryview]]) -> list[bytes]:
    """16 bytes for each picture's head and data, which is cut into leaves whose digests are hashed again."""
    cut = [_leaves(data) for _, data in pictures]
    leaves = [leaf for some in cut for leaf in some]
    found = iter(_pool().map(_leaf, leaves) if len(leaves) > 2 else map(_leaf, leaves))
    out = []
    for (head, _), some in zip(pictures, cut, strict=True):
        root = hashlib.blake2b(head, digest_size=DIGEST_BYTES)
        for _ in some:
            root.update(next(found))
        out.append(root.digest())
    return out


def _leaves(data: memoryview) -> list[memoryview]:
    data = data.cast("B") if data.format != "B" or data.ndim != 1 else data
    return [data[at : at + LEAF] for at in range(0, len(data), LEAF)]


def _leaf(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="huoyan-digest")
