"""Pillow's bicubic resize of 8-bit pixels, as tables: which input pixels make an output pixel, and by how much.

Pillow resizes along one side, rounds to 8 bits, then along the other. Each pass is a weighted sum of 32-bit
integers, so whoever has these tables and adds integers gets Pillow's bytes, in whatever order it adds. Which side
comes first depends on Pillow's version.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import __version__ as PILLOW_VERSION

from huoyan.media.types import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRECISION_BITS = 22
"""Weights are whole multiples of 2**-22: 32 bits less 8 of the pixel, less 2 for sums outside of 0..255."""


@dataclass(frozen=True, eq=False)
class BicubicTable:
    """Output pixel i is `clip8((2**21 + sum_k weights[k, i] * input[first[i] + k]) >> 22)`.

    Taps beyond the last input pixel weigh nothing.
    """

    first: NDArray[np.int32]
    """[out]"""
    weights: NDArray[np.int32]
    """[taps, out]"""

    @property
    def taps(self) -> int:
        return int(self.weights.shape[0])


def height_first(size_in: Size, size_out: Size, pillow: str = PILLOW_VERSION) -> bool:
    """Whether Pillow `pillow` resizes along the height before the width. Sizes are (width, height).

    Until 12.1 never; then for strips; from 13 on wherever the height loses more than twice what the width loses.
    """
    release = tuple(int(part) for part in pillow.split(".")[:2])
    (width, height), lost = size_in, size_in[1] - size_out[1]
    if lost <= 0 or release < (12, 2):
        return False
    return height > 100 * width if release < (13, 0) else lost > 2 * (width - size_out[0])


@lru_cache(maxsize=128)
def bicubic_table(size_in: int, size_out: int) -> BicubicTable:
    """The table for one side. Some 16 bytes an input pixel when it shrinks, an output pixel when it grows.

    The operations and their order are those of Pillow in float64: a sum in another order may round a weight to
    its neighbour.
    """
    if size_in == size_out:
        whole = np.full((1, size_out), 1 << PRECISION_BITS, np.int32)
        return _frozen(np.arange(size_out, dtype=np.int32), whole)
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(size_out) + 0.5) * scale
    # Casting cuts towards zero, as in C; below zero both ends are the border anyway.
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), size_in)
    counts = last - first
    tap = np.arange(counts.max())
    distance = (tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch)
    weights = np.where(tap < counts[:, None], _bicubic(distance), 0.0)
    # A running sum adds one after the other; numpy's `sum` adds in pairs.
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    fixed = np.trunc(weights * (1 << PRECISION_BITS) + np.where(weights < 0, -0.5, 0.5))
    return _frozen(first.astype(np.int32), np.ascontiguousarray(fixed.T).astype(np.int32))


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cubic convolution kernel with a = -1/2."""
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _frozen(first: NDArray[np.int32], weights: NDArray[np.int32]) -> BicubicTable:
    first.flags.writeable = weights.flags.writeable = False
    return BicubicTable(first, weights)
