"""Slices as the published image processor lays out what it gives: what vLLM's model reads.

Bytes are put in order and looked up in a table, by numpy: torch would share the arithmetic out among threads that go on
spinning for a while, on the cores of vLLM's own process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from huoyan.models.patches import Grid, normalised_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from huoyan.media.types import SliceRules


def published_patches(
    slices: Sequence[NDArray[np.uint8]], rules: SliceRules, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Grid]]:
    """uint8 slices [height, width, 3], sides divisible by the patch size, put in order and normalised.

    Returns:
        for each slice [3, patch, patches * patch], its patches side by side, row by row; and (rows, columns) of each.
    """
    side = rules.patch_size
    table = _table(tuple(rules.norm_mean), tuple(rules.norm_std), dtype)
    alike = bool((table == table[:1]).all())
    parts, grids = [], []
    for pixels in slices:
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        tiles = pixels.reshape(rows, side, columns, side, 3).transpose(4, 1, 0, 2, 3).reshape(3, -1)
        # Every byte has its place in the table: "wrap" only leaves out the check.
        if alike:
            values = table[0].take(tiles, mode="wrap")
        else:
            values = np.stack(
                [own.take(bytes_, mode="wrap") for own, bytes_ in zip(table, tiles, strict=True)]
            )
        parts.append(torch.from_numpy(values).view(dtype).view(3, side, -1))
        grids.append((rows, columns))
    return parts, grids


@lru_cache(maxsize=8)
def _table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> NDArray[Any]:
    """What each byte of each channel becomes, [3, 256]: in numpy, which has no bfloat16, 16-bit numbers as their
    bits."""
    values = normalised_bytes(mean, std, dtype, torch.device("cpu"))
    found: NDArray[Any] = (values.view(torch.int16) if dtype.itemsize == 2 else values).numpy()
    return found
