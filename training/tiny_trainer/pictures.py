"""From a drawn picture to patches, and what is drawn in each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from huoyan.media.slicing import cut_slices, plan_slices
from huoyan.media.types import SlicePlan, SliceRules
from huoyan.models.patches import Grid, cut_patches

CHANNELS = 5
"""Of `CutPictures.marks`: see `paint`."""

_LEGIBLE = 0.4
"""Characters lower than this share of a patch are not asked of the encoder."""


class MarkLike(Protocol):
    """A drawn thing: class and colour as indices, `box` (left, top, right, bottom) in pixels."""

    kind: int
    colour: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class CutPictures:
    """Slices of one or more pictures, end to end."""

    patches: NDArray[np.uint8]
    marks: NDArray[np.uint8]
    grids: list[Grid]
    plans: list[SlicePlan]


def cut_pictures(
    pictures: Sequence[NDArray[np.uint8]],
    marks: Sequence[Sequence[MarkLike]],
    rules: SliceRules,
    *,
    max_slice_nums: int | None = None,
    first_character: int = 256,
) -> CutPictures:
    """Slice as the product does, and paint each picture's marks onto the patches of its slices.

    Args:
        first_character: classes from this one on are characters, which may be too small to read.
    """
    slices: list[NDArray[np.uint8]] = []
    painted: list[NDArray[np.uint8]] = []
    plans = []
    for index, rgb in enumerate(pictures):
        size = (rgb.shape[1], rgb.shape[0])
        plan = plan_slices(size, rules, max_slice_nums)
        plans.append(plan)
        slices += cut_slices(rgb, plan)
        own = marks[index] if index < len(marks) else ()
        for region, grid in _regions(plan, size, rules.patch_size):
            painted.append(paint(own, region, grid, first_character))
    if not slices:
        width = 3 * rules.patch_size**2
        return CutPictures(np.zeros((0, width), np.uint8), np.zeros((0, CHANNELS), np.uint8), [], [])
    patches, grids = cut_patches(slices, rules.patch_size)
    return CutPictures(patches, np.concatenate(painted), grids, plans)


def _regions(
    plan: SlicePlan, size: tuple[int, int], patch: int
) -> list[tuple[tuple[float, float, float, float], Grid]]:
    """For each slice, the part of the picture it shows (left, top, right, bottom) and its grid of patches."""
    width, height = size
    out = [((0.0, 0.0, float(width), float(height)), (plan.overview[1] // patch, plan.overview[0] // patch))]
    if plan.grid is not None and plan.cell is not None:
        columns, rows = plan.grid
        grid = (plan.cell[1] // patch, plan.cell[0] // patch)
        x, y = width / columns, height / rows
        out += [((c * x, r * y, c * x + x, r * y + y), grid) for r in range(rows) for c in range(columns)]
    return out


def paint(
    marks: Sequence[MarkLike], region: tuple[float, float, float, float], grid: Grid, first_character: int
) -> NDArray[np.uint8]:
    """[rows * columns, 5]: class and colour drawn in each patch, later marks over earlier ones; the class of
    the thing whose middle is there; the character in its left and in its right half (from 1)."""
    rows, columns = grid
    out = np.zeros((rows, columns, CHANNELS), dtype=np.uint8)
    letters = np.zeros((rows, 2 * columns), dtype=np.uint8)
    left, top, right, bottom = region
    x_scale, y_scale = columns / (right - left), rows / (bottom - top)
    for mark in marks:
        x0, x1 = ((x - left) * x_scale for x in (mark.box[0], mark.box[2]))
        y0, y1 = ((y - top) * y_scale for y in (mark.box[1], mark.box[3]))
        if x1 <= 0 or y1 <= 0 or x0 >= columns or y0 >= rows:
            continue
        if mark.kind >= first_character:
            if y1 - y0 < _LEGIBLE:
                continue
            letters[_covered(y0, y1, rows), _covered(2 * x0, 2 * x1, 2 * columns)] = (
                mark.kind - first_character + 1
            )
        out[_covered(y0, y1, rows), _covered(x0, x1, columns), :2] = mark.kind, mark.colour
        x, y = int((x0 + x1) // 2), int((y0 + y1) // 2)
        if 0 <= x < columns and 0 <= y < rows:
            out[y, x, 2] = mark.kind
    out[:, :, 3:] = letters.reshape(rows, columns, 2)
    return out.reshape(rows * columns, CHANNELS)


def _covered(start: float, end: float, count: int) -> slice:
    """Unit cells of [0, count) whose middle lies between; a thing smaller than that still has its own cell."""
    first, last = max(math.ceil(start - 0.5), 0), min(math.floor(end - 0.5), count - 1)
    if first > last:
        first = last = min(max(int((start + end) // 2), 0), count - 1)
    return slice(first, last + 1)
