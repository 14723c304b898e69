"""Products with a matrix that is dense only a block of its rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from huoyan.planning.pieces import DENSE_VALUES


def linear_by_blocks(
    x: Tensor, width_out: int, dense: Callable[[int, int], Tensor], bias: Tensor | None = None
) -> Tensor:
    """x [T, in] times a matrix [width_out, in], of which `dense(start, stop)` gives some rows -> [T, width_out]."""
    rows = max(DENSE_VALUES // x.shape[1], 1)
    if rows >= width_out:
        return nn.functional.linear(x, dense(0, width_out), bias)
    # Written where it belongs: to join the pieces would take the product's memory twice.
    out = x.new_empty(x.shape[0], width_out)
    for start in range(0, width_out, rows):
        stop = min(start + rows, width_out)
        part, weight = out[:, start:stop], dense(start, stop).T
        if bias is None:
            torch.mm(x, weight, out=part)
        else:
            torch.addmm(bias[start:stop], x, weight, out=part)
    return out
