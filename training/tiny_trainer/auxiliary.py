"""What the encoder must name in each patch while it learns to see. The heads are thrown away at the end.

Without them the only lesson is a few answer tokens for 256 patches, and seeing starts late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from huoyan.models.patches import Grid
from tiny_trainer.initial import LATTICE


@dataclass(frozen=True)
class Classes:
    """How many classes the channels of `Record.marks` have: thing, colour, thing at its middle, and the
    character in the left and in the right half of a patch; 0 is nothing in each of them."""

    thing: int
    colour: int
    character: int

    @property
    def of_channels(self) -> tuple[int, ...]:
        return self.thing, self.colour, self.thing, self.character, self.character


_NOTHING_WEIGHTS = (0.15, 0.15, 0.02, 0.02, 0.02)
"""Nothing is drawn in most patches: so much does it count to say so."""
_PRESENCE = 3
_READ_POINTS = 8


class AuxiliaryHeads(nn.Module):
    """Linear readings of the encoder's output (what is in this patch?) and of the resampler's (what is in
    this query's cell, and which characters, in order?)."""

    def __init__(self, width: int, hidden: int, classes: Classes) -> None:
        super().__init__()
        self.classes = classes
        self.of_patch = nn.Linear(width, sum(classes.of_channels))
        self.of_query = nn.Linear(hidden, sum(classes.of_channels[:_PRESENCE]))
        self.read = nn.Linear(hidden, _READ_POINTS * classes.character)
        for head in (self.of_patch, self.of_query, self.read):
            nn.init.normal_(head.weight, 0.0, 0.02)
            nn.init.zeros_(head.bias)
        # Most classes are absent from most cells.
        nn.init.constant_(self.of_query.bias, -4.0)

    def patch_loss(self, x: Tensor, marks: Tensor) -> Tensor:
        """x [P, width], marks [P, channels] -> the mean over channels of a cross-entropy."""
        losses = []
        for scores, target, nothing in zip(
            self.of_patch(x).float().split(self.classes.of_channels, -1),
            marks.long().unbind(1),
            _NOTHING_WEIGHTS,
            strict=True,
        ):
            losses.append(_balanced(scores, target, nothing))
        return torch.stack(losses).mean()

    def query_loss(self, y: Tensor, marks: Tensor, near: Near) -> Tensor:
        """y [slices * queries, hidden]: which classes are drawn in its cell, and the characters there."""
        drawn = marks[near.patches].long()
        losses = []
        for channel, scores in enumerate(
            self.of_query(y).float().split(self.classes.of_channels[:_PRESENCE], -1)
        ):
            target = torch.zeros_like(scores).scatter_(1, drawn[:, :, channel], 1.0)[:, 1:]
            loss = binary_cross_entropy_with_logits(
                scores[:, 1:], target, weight=1.0 + 4.0 * target, reduction="none"
            )
            losses.append(loss.sum(1).mean())
        letters = marks[:, _PRESENCE:].flatten()[near.halves].long()
        scores = self.read(y).float().unflatten(-1, (_READ_POINTS, -1))
        losses.append(_balanced(scores.flatten(0, 1), letters.flatten(), _NOTHING_WEIGHTS[-1]))
        return torch.stack(losses).mean()


def _balanced(scores: Tensor, target: Tensor, nothing: float) -> Tensor:
    weight = torch.where(target > 0, 1.0, nothing)
    return (cross_entropy(scores, target, reduction="none") * weight).sum() / weight.sum()


@dataclass(frozen=True, eq=False)
class Near:
    """What lies in each query's cell, for the queries of all slices in order: `patches` [N, 9], rows of the
    batch's patches; `halves` [N, 8], four across and two down, rows of the patches' halves."""

    patches: Tensor
    halves: Tensor

    def to(self, device: torch.device) -> Near:
        return Near(*(t.to(device, non_blocking=True) for t in (self.patches, self.halves)))


class Places:
    """Works out `Near` on the host, so that the device never waits for it."""

    def __init__(self) -> None:
        self.cache: dict[Grid, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def _of_grid(self, grid: Grid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if grid not in self.cache:
            rows, columns = grid
            # A cell of few patches names some of them more than once.
            patches = _points(rows, 3)[:, None, :, None] * columns + _points(columns, 3)[None, :, None, :]
            halves = (
                _points(rows, 2)[:, None, :, None] * 2 * columns + _points(2 * columns, 4)[None, :, None, :]
            )
            queries = LATTICE * LATTICE
            self.cache[grid] = patches.reshape(queries, 9), halves.reshape(queries, _READ_POINTS)
        return self.cache[grid]

    def near(self, grids: Sequence[Grid]) -> Near:
        sizes = np.array([rows * columns for rows, columns in grids])
        starts = (sizes.cumsum() - sizes)[:, None, None]
        patches, halves = zip(*(self._of_grid(grid) for grid in grids), strict=True)
        return Near(
            torch.from_numpy((np.stack(patches) + starts).reshape(-1, 9)),
            torch.from_numpy((np.stack(halves) + 2 * starts).reshape(-1, _READ_POINTS)),
        )


def _points(count: int, each: int) -> NDArray[np.int64]:
    """[LATTICE, each]: which of `count` units lie at `each` points of every lattice cell."""
    at = (np.arange(each * LATTICE) + 0.5) / (each * LATTICE)
    index: NDArray[np.int64] = (at * count).astype(np.int64).reshape(LATTICE, each)
    return index
