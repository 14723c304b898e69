"""From uploaded pictures to the encoder's patches: Pillow's resize, cut in slices and patches, normalised.

Two kernels. The first resamples one side; the second resamples the other while it writes every pixel to its place
in its patch, through a table of 256 values a channel that normalises it. Sums are of integers, so the pixels are
Pillow's, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.launching import launch
from huoyan.layers.bicubic import resize_bicubic, table_on_device
from huoyan.media.bicubic import PRECISION_BITS, bicubic_table, height_first
from huoyan.media.types import Size

_BLOCK = 1024


@dataclass(frozen=True)
class Cut:
    """Resize to `cell * grid` and cut into `grid = (columns, rows)` cells of `cell` = (width, height) pixels."""

    cell: Size
    grid: tuple[int, int] = (1, 1)

    @property
    def size(self) -> Size:
        return self.cell[0] * self.grid[0], self.cell[1] * self.grid[1]

    @property
    def num_cells(self) -> int:
        return self.grid[0] * self.grid[1]


def picture_patches_reference(
    pixels: Tensor, cut: Cut, patch_size: int, values: Tensor, first_rows: Tensor, out: Tensor
) -> Tensor:
    """The same in plain PyTorch; see `picture_patches`."""
    (width, height), (columns, rows), p = cut.cell, cut.grid, patch_size
    resized = resize_bicubic(pixels, *cut.size)
    cells = resized.unflatten(2, (columns, width)).unflatten(1, (rows, height)).transpose(2, 3)
    tiles = cells.flatten(0, 2).unflatten(2, (-1, p)).unflatten(1, (-1, p))
    patches = tiles.permute(0, 1, 3, 5, 2, 4).flatten(1, 2)
    normal = torch.stack([values[c][patches[:, :, c].long()] for c in range(3)], 2).flatten(2)
    at = first_rows.long().unsqueeze(1) + torch.arange(normal.shape[1], device=out.device)
    return out.index_copy_(0, at.flatten(), normal.flatten(0, 1).to(out.dtype))


# Sizes are as various as pictures: a kernel compiled for each kind of number would be compiled again and again.
_any_size = partial(
    triton.jit,
    do_not_specialize=[
        "total", "side_in", "side_out", "inner", "taps", "in_height", "in_width", "out_height", "out_width",
        "cell_height", "cell_width", "columns", "cells",
    ],
    do_not_specialize_on_alignment=["in_ptr", "first_ptr", "weights_ptr", "values_ptr", "rows_ptr", "out_ptr"],
)  # fmt: skip


@_any_size
def _resample_kernel(
    in_ptr, first_ptr, weights_ptr, out_ptr, total, side_in, side_out, inner, taps,
    ROUND: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[outer, side_in, inner] -> [outer, side_out, inner]"""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = e < total
    o = (e // inner) % side_out
    outer = e // (inner * side_out)
    base = outer * side_in * inner + e % inner
    first = tl.load(first_ptr + o, mask=ok, other=0)
    acc = tl.full((BLOCK,), ROUND, tl.int32)
    for k in range(taps):
        weight = tl.load(weights_ptr + k * side_out + o, mask=ok, other=0)
        # Taps beyond the last pixel have no weight, but must not read beyond it.
        at = tl.minimum(first + k, side_in - 1)
        acc += weight * tl.load(in_ptr + base + at * inner, mask=ok, other=0).to(tl.int32)
    pixel = tl.minimum(tl.maximum(acc >> BITS, 0), 255)
    tl.store(out_ptr + e, pixel.to(tl.uint8), mask=ok)


@_any_size
def _patches_kernel(
    in_ptr, first_ptr, weights_ptr, values_ptr, rows_ptr, out_ptr, total, in_height, in_width, out_height, out_width,
    cell_height, cell_width, columns, cells, taps,
    ALONG_WIDTH: tl.constexpr, PATCH: tl.constexpr, ROUND: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[pictures, in_height, in_width, 3] -> rows of [3 * PATCH * PATCH], in the order of the output"""
    AREA: tl.constexpr = PATCH * PATCH
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = e < total
    of_cell = 3 * cell_height * cell_width
    piece = e // of_cell
    in_piece = e % of_cell
    picture = piece // cells
    cell = piece % cells
    patch = in_piece // (3 * AREA)
    in_patch = in_piece % (3 * AREA)
    channel = in_patch // AREA
    per_row = cell_width // PATCH
    y = (cell // columns) * cell_height + (patch // per_row) * PATCH + (in_patch % AREA) // PATCH
    x = (cell % columns) * cell_width + (patch % per_row) * PATCH + in_patch % PATCH
    if ALONG_WIDTH:
        o, size, side, step = x, out_width, in_width, 3
        base = (picture * in_height + y) * in_width * 3 + channel
    else:
        o, size, side, step = y, out_height, in_height, in_width * 3
        base = picture * in_height * in_width * 3 + x * 3 + channel
    first = tl.load(first_ptr + o, mask=ok, other=0)
    acc = tl.full((BLOCK,), ROUND, tl.int32)
    for k in range(taps):
        weight = tl.load(weights_ptr + k * size + o, mask=ok, other=0)
        at = tl.minimum(first + k, side - 1)
        acc += weight * tl.load(in_ptr + base + at * step, mask=ok, other=0).to(tl.int32)
    pixel = tl.minimum(tl.maximum(acc >> BITS, 0), 255)
    value = tl.load(values_ptr + channel * 256 + pixel, mask=ok)
    row = tl.load(rows_ptr + piece, mask=ok, other=0).to(tl.int64) + patch
    tl.store(out_ptr + row * (3 * AREA) + in_patch, value, mask=ok)


class ResizeTables:
    """The bicubic tables that a device has been sent, the most recent ones."""

    def __init__(self, device: torch.device, most: int = 128) -> None:
        self._device = device
        self._most = most
        self._tables: dict[Size, tuple[Tensor, Tensor]] = {}

    def __call__(self, size_in: int, size_out: int) -> tuple[Tensor, Tensor]:
        key = size_in, size_out
        found = self._tables.pop(key, None)
        if found is None:
            found = table_on_device(bicubic_table(size_in, size_out), self._device)
            if len(self._tables) >= self._most:
                del self._tables[next(iter(self._tables))]
        self._tables[key] = found
        return found


def picture_patches(
    pixels: Tensor,
    cut: Cut,
    patch_size: int,
    values: Tensor,
    first_rows: Tensor,
    out: Tensor,
    tables: ResizeTables,
) -> Tensor:
    """Resize pictures of one size, cut them and write their patches. Offsets are 32-bit: some 2 GB on the way at most.

    Args:
        pixels: uint8 [pictures, height, width, 3], contiguous.
        cut: what they become; both sides of the cell are multiples of `patch_size`.
        values: [3, 256], what a byte of each channel becomes; of `out`'s dtype.
        first_rows: int32 [pictures * cells], the row of `out` where each cell's patches begin.
        out: [patches, 3 * patch_size**2], contiguous; changed.
    """
    pictures, height, width, _ = pixels.shape
    new_width, new_height = cut.size
    along_width = height_first((width, height), cut.size) or height == new_height
    if along_width and height != new_height:
        pixels = _resample(pixels, pictures, height, new_height, width * 3, tables)
        height = new_height
    elif not along_width and width != new_width:
        pixels = _resample(pixels, pictures * height, width, new_width, 3, tables)
        width = new_width
    first, weights = tables(width, new_width) if along_width else tables(height, new_height)
    total = pictures * new_width * new_height * 3
    launch(
        _patches_kernel, (triton.cdiv(total, _BLOCK),),
        pixels, first, weights, values, first_rows, out, total, height, width, new_height, new_width,
        cut.cell[1], cut.cell[0], cut.grid[0], cut.num_cells, weights.shape[0],
        ALONG_WIDTH=along_width, PATCH=patch_size, ROUND=1 << (PRECISION_BITS - 1), BITS=PRECISION_BITS, BLOCK=_BLOCK,
    )  # fmt: skip
    return out


def _resample(
    pixels: Tensor, outer: int, side_in: int, side_out: int, inner: int, tables: ResizeTables
) -> Tensor:
    first, weights = tables(side_in, side_out)
    out = torch.empty(outer * side_out * inner, dtype=torch.uint8, device=pixels.device)
    launch(
        _resample_kernel, (triton.cdiv(out.numel(), _BLOCK),),
        pixels, first, weights, out, out.numel(), side_in, side_out, inner, weights.shape[0],
        ROUND=1 << (PRECISION_BITS - 1), BITS=PRECISION_BITS, BLOCK=_BLOCK,
    )  # fmt: skip
    return out
