"""Products with a matrix that is dense only a block of its rows at a time, or of some rows of the inputs at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from huoyan.kernels import decode_kernels_enabled
from huoyan.layers.fused import silu_mul_over
from huoyan.planning.pieces import dense_rows


def linear_by_blocks(
    x: Tensor,
    width_out: int,
    dense: Callable[[int, int], Tensor],
    bias: Tensor | None = None,
    rows: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, in] times a matrix [width_out, in], of which `dense(start, stop)` gives some rows -> [T, width_out].

    `rows`: how many at a time, where they are other than `dense_rows`; `out`: where the result goes, if not to memory
    of its own.
    """
    rows = rows or dense_rows(width_out, x.shape[1], x.is_cuda and decode_kernels_enabled())
    if rows >= width_out and out is None:
        return nn.functional.linear(x, dense(0, width_out), bias)
    # Filled piece by piece: to join the pieces would take the product's memory twice.
    out = x.new_empty(x.shape[0], width_out) if out is None else out
    for start in range(0, width_out, rows):
        stop = min(start + rows, width_out)
        to, some = out[:, start:stop], dense(start, stop).T
        if bias is None:
            torch.mm(x, some, out=to)
        else:
            torch.addmm(bias[start:stop], x, some, out=to)
    return out


def gated_by_blocks(x: Tensor, width: int, dense: Callable[[int, int], Tensor], some: int) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T) -> [T, width], of a matrix [2 width, in], the gate first: `dense` as of
    `linear_by_blocks`. `some` products with `up` are made at a time for all of x, and written over the gates."""
    rows = dense_rows(width, x.shape[1], x.is_cuda and decode_kernels_enabled())
    out = x.new_empty(x.shape[0], width)
    for start in range(0, width, rows):
        stop = min(start + rows, width)
        gates = out[:, start:stop]
        torch.mm(x, dense(start, stop).T, out=gates)
        up = dense(width + start, width + stop).T
        for gate, part in zip(gates.split(some, 1), up.split(some, 1), strict=True):
            silu_mul_over(gate, x @ part)
    return out


def over_rows(compute: Callable[[Tensor], Tensor], x: Tensor, some: int) -> Tensor:
    """x [T, width] becomes compute(x), `some` rows at a time; `compute` may give its argument, written over."""
    for part in x.split(some):
        found = compute(part)
        if found.data_ptr() != part.data_ptr():
            part.copy_(found)
    return x
