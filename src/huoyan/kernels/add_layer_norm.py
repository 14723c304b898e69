"""Add a layer's output to the residual stream and give the sum's layer norm, in one pass over both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, wait
from huoyan.kernels.launching import launch


def add_layer_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(normed, sum) in plain PyTorch: the sum is rounded to its dtype before it is normalised."""
    total = x if residual is None else x + residual
    if added is not None:
        total = total + added
    return torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps), total


@triton.jit
def _kernel(
    x_ptr, residual_ptr, added_ptr, weight_ptr, bias_ptr, normed_ptr, width, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    ok = column < width
    weight = tl.load(weight_ptr + column, mask=ok, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=ok, other=0.0).to(tl.float32)
    if HAS_ADDED:
        added = tl.load(added_ptr + column, mask=ok, other=0.0).to(tl.float32)
    wait(OVERLAP)
    dtype = normed_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + column, mask=ok, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row + column, mask=ok, other=0.0)
        x = x.to(tl.float32) + residual.to(tl.float32)
        if HAS_ADDED:
            x += added
        x = x.to(dtype)
        tl.store(residual_ptr + row + column, x, mask=ok)
    value = x.to(tl.float32)
    centred = tl.where(ok, value - tl.sum(value, axis=0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    tl.store(normed_ptr + row + column, (centred * scale * weight + bias).to(dtype), mask=ok)


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) of contiguous x, residual [T, width]: x and residual, written over.
    `added` [width] is added to the sum, of which the product that gave x had left it out.

    Without a residual, and then without `added`, the first is new, and the second is x as it was. An encoder pass so
    has two tensors that stay where they are from layer to layer, and what else it takes fits between them each time.
    """
    rows, width = x.shape
    normed = x if residual is not None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    overlap = x.is_cuda and overlaps()
    assert added is None or residual is not None
    launch(
        _kernel, (rows,),
        x, residual if residual is not None else x, x if added is None else added, weight, bias, normed, width, eps,
        HAS_RESIDUAL=residual is not None, HAS_ADDED=added is not None, BLOCK=block, OVERLAP=overlap,
        num_warps=min(8, max(1, block // 512)), **launch_options(overlap),
    )  # fmt: skip
    return normed, x if residual is None else residual
