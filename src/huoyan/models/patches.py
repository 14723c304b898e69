"""From uint8 slices to the encoder's patches, in the order of the checkpoint's patch embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Grid = tuple[int, int]
"""(rows, columns) of patches."""


def cut_patches(slices: Sequence[NDArray[np.uint8]], patch_size: int) -> tuple[NDArray[np.uint8], list[Grid]]:
    """Cut slices [height, width, 3] into patches, row by row.

    Returns:
        patches uint8 [sum(rows * columns), 3 * patch_size**2], channel first within a patch, and the grids.
    """
    grids = [(s.shape[0] // patch_size, s.shape[1] // patch_size) for s in slices]
    total = sum(rows * columns for rows, columns in grids)
    out = np.empty((total, 3, patch_size, patch_size), dtype=np.uint8)
    at = 0
    for pixels, (rows, columns) in zip(slices, grids, strict=True):
        tiles = pixels.reshape(rows, patch_size, columns, patch_size, 3)
        block = out[at : at + rows * columns].reshape(rows, columns, 3, patch_size, patch_size)
        block[...] = tiles.transpose(0, 2, 4, 1, 3)
        at += rows * columns
    return out.reshape(total, -1), grids


def normalise(patches: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(x / 255 - mean) / std for each channel of uint8 patches [P, 3 * pixels], computed in float32."""
    x = patches.view(patches.shape[0], 3, -1).float().div_(255)
    if len(set(mean)) == 1 and len(set(std)) == 1:
        x = x.sub_(mean[0]).div_(std[0])
    else:
        x = x.sub_(x.new_tensor(mean).view(1, 3, 1)).div_(x.new_tensor(std).view(1, 3, 1))
    return x.view(patches.shape[0], -1).to(dtype)


def normalised_bytes(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What `normalise` makes of each byte: [3, 256]."""
    every = torch.arange(256, dtype=torch.uint8, device=device).repeat(3).view(1, 768)
    return normalise(every, mean, std, dtype).view(3, 256)
