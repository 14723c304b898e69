"""Slices as the published image processor lays out what it gives: what vLLM's model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from huoyan.models.patches import Grid, normalise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from huoyan.media.types import SliceRules


def published_patches(
    slices: Sequence[NDArray[np.uint8]], rules: SliceRules, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Grid]]:
    """uint8 slices [height, width, 3], sides divisible by the patch size, put in order and then normalised.

    Returns:
        for each slice [3, patch, patches * patch], its patches side by side, row by row; and (rows, columns) of each.
    """
    side = rules.patch_size
    parts, grids = [], []
    for pixels in slices:
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        tiles = torch.from_numpy(pixels).view(rows, side, columns, side, 3).permute(4, 1, 0, 2, 3)
        normal = normalise(tiles.reshape(1, -1), rules.norm_mean, rules.norm_std, dtype)
        parts.append(normal.view(3, side, -1))
        grids.append((rows, columns))
    return parts, grids
