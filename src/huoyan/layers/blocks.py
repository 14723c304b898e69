"""Products with a matrix that is dense only a block of its rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from huoyan.kernels import decode_kernels_enabled
from huoyan.planning.pieces import dense_rows


def linear_by_blocks(
    x: Tensor,
    width_out: int,
    dense: Callable[[int, int], Tensor],
    bias: Tensor | None = None,
    rows: int | None = None,
) -> Tensor:
    """x [T, in] times a matrix [width_out, in], of which `dense(start, stop)` gives some rows -> [T, width_out].

    `rows`: how many at a time, where they are other than `dense_rows`.
    """
    rows = rows or dense_rows(width_out, x.shape[1], x.is_cuda and decode_kernels_enabled())
    if rows >= width_out:
        return nn.functional.linear(x, dense(0, width_out), bias)
    # Filled piece by piece: to join the pieces would take the product's memory twice.
    out = x.new_empty(x.shape[0], width_out)
    for start in range(0, width_out, rows):
        stop = min(start + rows, width_out)
        to, some = out[:, start:stop], dense(start, stop).T
        if bias is None:
            torch.mm(x, some, out=to)
        else:
            torch.addmm(bias[start:stop], x, some, out=to)
    return out
