"""Batches of one fixed shape, whatever examples fill them.

Every step then runs the same kernels on the same memory, so that on a GPU a whole step is one CUDA graph. What is
not filled is padding: slices without an example, which see only themselves, and tokens that nothing is learned from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiny_trainer.grids import LONGEST, GridTables
from tiny_trainer.pool import Kept

QUERIES = 64


@dataclass(frozen=True)
class Shape:
    """Of a step: `patches` in `slices` slices; token rows, as (how many, how long)."""

    patches: int
    slices: int
    rows: tuple[tuple[int, int], ...]

    @classmethod
    def for_examples(cls, count: int) -> Shape:
        """Room for about `count` examples of the usual mixture, and for any single one."""
        patches = max(560 * count, 4096) // 64 * 64
        rows = ((max(count * 3 // 8, 4), 512), (max(count * 9 // 32, 4), 1024))
        return cls(patches=patches, slices=-(-patches // 200), rows=rows)

    @cached_property
    def tokens(self) -> int:
        return sum(count * length for count, length in self.rows)

    @cached_property
    def fields(self) -> dict[str, int]:
        """What the host sends for a step, in this order, and how many numbers each has."""
        per_token = dict.fromkeys(("ids", "positions", "owner", "branch", "family", "weights"), self.tokens)
        per_slice = {"starts": self.slices + 1, "grids": self.slices, "sources": self.slices}
        return {**per_slice, "slots": self.slices * QUERIES, **per_token}

    @property
    def numbers(self) -> int:
        return sum(self.fields.values())


@dataclass(frozen=True, eq=False)
class FixedBatch:
    """A step's inputs as views of one int32 buffer on the device.

    Attributes:
        starts: [slices + 1] where each slice's patches begin.
        grids: [slices] numbers of `GridTables`; 0 is padding.
        sources: [slices] the pool's row with its first patch; -1 for padding.
        slots: [slices * QUERIES] token that each embedding stands in for; `tokens` for none.
        ids, positions, owner, branch, family: [tokens]; owner tells the examples in a row apart, -1 is padding.
        weights: [tokens] float32, how much predicting the next token counts.
    """

    starts: Tensor
    grids: Tensor
    sources: Tensor
    slots: Tensor
    ids: Tensor
    positions: Tensor
    owner: Tensor
    branch: Tensor
    family: Tensor
    weights: Tensor

    @classmethod
    def of(cls, buffer: Tensor, shape: Shape) -> FixedBatch:
        parts = dict(zip(shape.fields, buffer.split(list(shape.fields.values())), strict=True))
        parts["weights"] = parts["weights"].view(torch.float32)
        return cls(**parts)


class Packer:
    """Puts examples into the next batch: `begin`, `add` for each, longest first, and `finish`."""

    def __init__(self, shape: Shape, grids: GridTables, slot_id: int, families: Mapping[str, int]) -> None:
        self.shape, self.grids, self.slot_id, self.families = shape, grids, slot_id, families
        lengths = [length for count, length in shape.rows for _ in range(count)]
        self.row_length = np.array(lengths)
        self.row_start = np.cumsum([0, *lengths[:-1]])
        self._buffer = np.zeros(0, dtype=np.int32)
        self._views: dict[str, NDArray[np.int32]] = {}
        self.begin(np.zeros(shape.numbers, dtype=np.int32))

    def begin(self, buffer: NDArray[np.int32]) -> None:
        """Start a batch in this buffer [shape.numbers]."""
        self._buffer = buffer
        cuts = np.cumsum(list(self.shape.fields.values()))[:-1]
        self._views = dict(zip(self.shape.fields, np.split(buffer, cuts), strict=True))
        self._views["slots"][:] = self.shape.tokens
        self._views["grids"][:] = 0
        self._views["sources"][:] = -1
        for name in ("ids", "positions", "branch", "family", "weights"):
            self._views[name][:] = 0
        self._views["owner"][:] = -1
        self.used = np.zeros(len(self.row_length), dtype=np.int64)
        self.examples = self.slices = self.patches = 0
        self._sizes: list[NDArray[np.int64]] = []

    def add(self, kept: Kept) -> bool:
        """False where there is no room for the example; the batch is then as it was."""
        record = kept.record
        count, length = len(record.grids), len(record.ids)
        slices, patches = self.slices + count, self.patches + kept.count
        left = self.row_length - self.used
        open_rows = np.flatnonzero(left >= length)
        if len(open_rows) == 0 or not self.has_room(slices, patches):
            return False
        row = open_rows[left[open_rows].argmin()]
        start = int(self.row_start[row] + self.used[row])
        views, end = self._views, start + length
        views["ids"][start:end] = record.ids
        views["positions"][start:end] = record.positions
        views["owner"][start:end] = self.examples
        views["branch"][start:end] = record.branch
        views["family"][start:end] = self.families[record.family]
        views["weights"][start:end] = record.weights.view(np.int32)
        if count:
            sizes = np.array([r * c for r, c in record.grids])
            views["grids"][self.slices : slices] = [self.grids.number(grid) for grid in record.grids]
            views["sources"][self.slices : slices] = kept.start + np.cumsum(sizes) - sizes
            places = np.flatnonzero(record.ids == self.slot_id)
            views["slots"][self.slices * QUERIES : slices * QUERIES] = places + start
            self._sizes.append(sizes)
        self.used[row] += length
        self.examples += 1
        self.slices, self.patches = slices, patches
        return True

    def has_room(self, slices: int, patches: int) -> bool:
        """Whether so many fit into a batch: padding needs a slice, and each slice that is padding a patch."""
        padding = self.shape.slices - slices
        return padding >= 1 and patches + padding <= self.shape.patches

    def finish(self) -> NDArray[np.int32]:
        """The buffer, complete."""
        padding, left = self.shape.slices - self.slices, self.shape.patches - self.patches
        if not padding <= left <= padding * LONGEST:
            raise ValueError(f"{left} patches are left over for {padding} slices of padding")
        rest = np.full(padding, left // padding)
        rest[: left % padding] += 1
        self._views["starts"][0] = 0
        np.cumsum(np.concatenate([*self._sizes, rest]), out=self._views["starts"][1:], dtype=np.int32)
        return self._buffer
