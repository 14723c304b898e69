"""What depends on a slice's grid alone, for every grid there can be, so that a device looks it up by number."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from huoyan.models.patches import Grid
from huoyan.models.resampler import sincos_positions
from huoyan.models.siglip import position_ids
from tiny_trainer.initial import LATTICE

LONGEST = 288
"""Patches a slice may have: slices are about 256, and their sides are rounded to whole patches."""
_SIDE = 70
NEAR_PATCHES = 9
READ_POINTS = 8


class GridTables:
    """Rows by number of grid; 0 is the padding's, whose every patch has position 0.

    Attributes:
        positions: [grids, LONGEST] rows of the encoder's position table.
        places: [grids, LONGEST] rows of `waves`.
        waves: [_SIDE ** 2, width] the resampler's position embeddings.
        near: [grids, LATTICE ** 2, NEAR_PATCHES] which patches lie in each query's cell.
        halves: [grids, LATTICE ** 2, READ_POINTS] the same of patches' left and right halves, in reading order.
    """

    def __init__(self, side: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        grids = [(r, c) for r in range(1, _SIDE + 1) for c in range(1, _SIDE + 1) if r * c <= LONGEST]
        self.numbers: Mapping[Grid, int] = {grid: i for i, grid in enumerate(grids, 1)}
        shape = (len(grids) + 1, LONGEST)
        positions, places = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        near = np.zeros((shape[0], LATTICE**2, NEAR_PATCHES), np.int64)
        halves = np.zeros((shape[0], LATTICE**2, READ_POINTS), np.int64)
        for i, (rows, columns) in enumerate(grids, 1):
            count = rows * columns
            positions[i, :count] = position_ids([(rows, columns)], side).numpy()
            places[i, :count] = (np.arange(rows)[:, None] * _SIDE + np.arange(columns)).ravel()
            near[i], halves[i] = _near(rows, columns)
        self.positions, self.places, self.near, self.halves = (
            torch.from_numpy(table).to(device) for table in (positions, places, near, halves)
        )
        axis = sincos_positions(_SIDE, width // 2)
        across, down = axis.expand(_SIDE, -1, -1), axis.unsqueeze(1).expand(-1, _SIDE, -1)
        self.waves: Tensor = torch.cat((across, down), dim=-1).flatten(0, 1).to(device, dtype)

    def number(self, grid: Grid) -> int:
        return self.numbers[grid]


def _near(rows: int, columns: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # A cell of few patches names some of them more than once.
    patches = _points(rows, 3)[:, None, :, None] * columns + _points(columns, 3)[None, :, None, :]
    halves = _points(rows, 2)[:, None, :, None] * 2 * columns + _points(2 * columns, 4)[None, :, None, :]
    return patches.reshape(LATTICE**2, NEAR_PATCHES), halves.reshape(LATTICE**2, READ_POINTS)


def _points(count: int, each: int) -> NDArray[np.int64]:
    """[LATTICE, each]: which of `count` units lie at `each` points of every lattice cell."""
    at = (np.arange(each * LATTICE) + 0.5) / (each * LATTICE)
    index: NDArray[np.int64] = (at * count).astype(np.int64).reshape(LATTICE, each)
    return index
