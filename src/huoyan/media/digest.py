"""A digest of a picture's pixels, by all cores: for one core hashing a large picture takes longer than resizing it."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

DIGEST_BYTES = 16
LEAF = 1 << 19
"""Bytes that are hashed at a time; part of what the digest is, so that it is the same on every machine."""


def digest_of(head: bytes, data: memoryview) -> bytes:
    """16 bytes that stand for `head` and `data`, which is cut into leaves whose digests are hashed again."""
    data = data.cast("B") if data.format != "B" or data.ndim != 1 else data
    leaves = [data[at : at + LEAF] for at in range(0, len(data), LEAF)]
    found = _pool().map(_leaf, leaves) if len(leaves) > 2 else map(_leaf, leaves)
    root = hashlib.blake2b(head, digest_size=DIGEST_BYTES)
    for digest in found:
        root.update(digest)
    return root.digest()


def _leaf(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="huoyan-digest")
