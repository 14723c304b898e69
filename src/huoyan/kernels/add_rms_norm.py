"""Add a layer's output to the residual stream and normalise the sum, in one pass over both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(normed, sum) in plain PyTorch: the sum is rounded to the dtype of x before it is normalised."""
    total = x if residual is None else x + residual
    return torch.nn.functional.rms_norm(total, weight.shape, weight, eps), total


@triton.jit
def _kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, sum_ptr, width, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < width
    x = tl.load(x_ptr + row * width + column, mask=ok, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * width + column, mask=ok, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + column, x, mask=ok)
    value = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * width + column, (value * scale * weight).to(x_ptr.dtype.element_ty), mask=ok)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual) * weight, x + residual) for x, residual [T, width], contiguous.

    Without a residual the second result is x itself.
    """
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _kernel[(x.shape[0],)](
        x, residual if residual is not None else x, weight, normed, total, width, eps,
        HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    return normed, total
