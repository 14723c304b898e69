"""What the prefix cache compares: a chain of digests over token ids and the pictures they stand for."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from huoyan.media.types import PreparedPicture
    from huoyan.prompt.types import PictureSlot

DIGEST_BYTES = 16
ROOT = b"\0" * DIGEST_BYTES


@dataclass(frozen=True)
class SliceRun:
    """The placeholder tokens [start, end) of one slice of one picture."""

    start: int
    end: int
    picture: int
    slice_index: int
    key: bytes


def slice_runs(pictures: Sequence[PreparedPicture], slots: Sequence[PictureSlot]) -> tuple[SliceRun, ...]:
    """All runs of a prompt in the order of their tokens."""
    runs = [
        SliceRun(offset, offset + slot.length, index, slice_index, picture.key)
        for index, (picture, slot) in enumerate(zip(pictures, slots, strict=True))
        for slice_index, offset in enumerate(slot.offsets)
    ]
    return tuple(sorted(runs, key=lambda run: run.start))


class BlockHasher:
    """Digests of one prompt's blocks and of the answers that follow it.

    Two blocks have one digest where all tokens up to their ends are the same, and where each placeholder
    stands for the same row of a picture with the same content.
    """

    def __init__(self, block_size: int, runs: Sequence[SliceRun]) -> None:
        self.block_size = block_size
        self._runs = runs
        self._ends = [run.end for run in runs]

    def digest(self, parent: bytes, block_index: int, token_ids: NDArray[np.int64]) -> bytes:
        """The digest of block `block_index`, whose tokens are `token_ids: [block_size]`."""
        state = blake2b(parent, digest_size=DIGEST_BYTES)
        state.update(token_ids.tobytes())
        start = block_index * self.block_size
        end = start + self.block_size
        for run in self._runs[bisect_right(self._ends, start) :]:
            if run.start >= end:
                break
            where = f"|{run.slice_index}|{run.start - start}|{run.end - start}|{len(run.key)}|"
            state.update(where.encode())
            state.update(run.key)
        return state.digest()
