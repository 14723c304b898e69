"""Products with a matrix that is dense only a block of its rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_DENSE_VALUES = 64 * 1024 * 1024
"""At most this many values of a matrix are dense at a time."""


def linear_by_blocks(
    x: Tensor, width_out: int, dense: Callable[[int, int], Tensor], bias: Tensor | None = None
) -> Tensor:
    """x [T, in] times a matrix [width_out, in], of which `dense(start, stop)` gives some rows -> [T, width_out]."""
    rows = max(_DENSE_VALUES // x.shape[1], 1)
    parts = []
    for start in range(0, width_out, rows):
        stop = min(start + rows, width_out)
        some = None if bias is None else bias[start:stop]
        parts.append(nn.functional.linear(x, dense(start, stop), some))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
