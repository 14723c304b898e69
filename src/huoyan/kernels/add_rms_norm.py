"""Add a layer's output to the residual stream and normalise the sum, in one pass over both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, wait
from huoyan.kernels.launching import launch


def add_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(normed, sum) in plain PyTorch: the sum is rounded to the dtype of the weight before it is normalised."""
    if x.dim() == 3:
        x = x.sum(0).to(weight.dtype)
    total = x if residual is None else x + residual
    return torch.nn.functional.rms_norm(total, weight.shape, weight, eps), total


# One form for all sizes: the fewer there are, the sooner a first start has compiled them.
@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, sum_ptr, rows, width, eps,
    PARTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < width
    weight = tl.load(weight_ptr + column, mask=ok, other=0.0).to(tl.float32)
    wait(OVERLAP)
    dtype = normed_ptr.dtype.element_ty
    if PARTS:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(x_ptr + (part * rows + row) * width + column, mask=ok, other=0.0)
        x = total.to(dtype)
    else:
        x = tl.load(x_ptr + row * width + column, mask=ok, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * width + column, mask=ok, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    if HAS_RESIDUAL or PARTS:
        tl.store(sum_ptr + row * width + column, x, mask=ok)
    value = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(normed_ptr + row * width + column, (value * scale * weight).to(dtype), mask=ok)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    over: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual) * weight, x + residual) for x, residual [T, width], contiguous.

    x may be float32 parts [S, T, width], whose sum is meant, rounded to weight's dtype. Without a residual the second
    result is x itself. `over`, where there is a residual and there are no parts: the first is written over x, the sum
    over the residual. `out`: [T, width], contiguous, in weight's dtype, where the first goes instead; it may be x.
    """
    parts = x.shape[0] if x.dim() == 3 else 0
    rows, width = x.shape[-2:]
    if over and residual is not None and not parts and x.dtype == residual.dtype == weight.dtype:
        # Each program has read its row before it writes.
        normed, total = x if out is None else out, residual
    else:
        shape, dtype = (rows, width), weight.dtype
        normed = torch.empty(shape, dtype=dtype, device=x.device) if out is None else out
        keeps_x = residual is None and not parts
        total = x if keeps_x else torch.empty(shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(width)
    overlap = x.is_cuda and overlaps()
    launch(
        _kernel, (rows,),
        x, residual if residual is not None else x, weight, normed, total, rows, width, eps,
        PARTS=parts, HAS_RESIDUAL=residual is not None, BLOCK=block, OVERLAP=overlap,
        num_warps=min(16, max(1, block // 256)), **launch_options(overlap),
    )  # fmt: skip
    return normed, total
