"""silu(gate) * up, where gate and up are the halves of one product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, wait
from huoyan.kernels.launching import launch


def silu_mul_reference(gate_up: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In plain PyTorch; see `silu_mul`."""
    dtype = dtype or gate_up.dtype
    if gate_up.dim() == 3:
        gate_up = gate_up.sum(0)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.float()).mul(up.float()).to(dtype)


# One form for all sizes: the fewer there are, the sooner a first start has compiled them.
@triton.jit(do_not_specialize=["rows"])
def _kernel(
    gate_up_ptr, out_ptr, rows, width, out_stride, PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    wait(OVERLAP)
    gate = tl.zeros((BLOCK,), dtype=tl.float32)
    up = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        at = gate_up_ptr + (part * rows + row) * 2 * width + column
        gate += tl.load(at, mask=ok, other=0.0).to(tl.float32)
        up += tl.load(at + width, mask=ok, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + column, value.to(out_ptr.dtype.element_ty), mask=ok)


def silu_mul(gate_up: Tensor, dtype: torch.dtype | None = None, *, in_place: bool = False) -> Tensor:
    """[T, 2 width] contiguous -> [T, width], computed in float32; or float32 parts [S, T, 2 width], to be summed.

    `dtype`: of the result, where it is not gate_up's. `in_place`, of what has no parts: written over the gates, so that
    the result is a view whose rows lie 2 width apart.
    """
    parts = gate_up.shape[0] if gate_up.dim() == 3 else 1
    rows, width = gate_up.shape[-2], gate_up.shape[-1] // 2
    if in_place:
        out = gate_up[:, :width]
    else:
        out = torch.empty((rows, width), dtype=dtype or gate_up.dtype, device=gate_up.device)
    overlap = gate_up.is_cuda and overlaps()
    launch(
        _kernel, (rows, triton.cdiv(width, 1024)),
        gate_up, out, rows, width, out.stride(0),
        PARTS=parts, BLOCK=1024, OVERLAP=overlap, num_warps=4, **launch_options(overlap),
    )  # fmt: skip
    return out


@triton.jit
def _over_kernel(gate_ptr, up_ptr, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    at = gate_ptr + row * gate_stride + column
    gate = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=ok, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(at, value.to(gate_ptr.dtype.element_ty), mask=ok)


def silu_mul_over(gate: Tensor, up: Tensor) -> None:
    """gate [T, width] becomes silu(gate) * up, computed in float32; the rows of either may lie apart."""
    rows, width = gate.shape
    launch(
        _over_kernel,
        (rows, triton.cdiv(width, 1024)),
        gate,
        up,
        width,
        gate.stride(0),
        up.stride(0),
        BLOCK=1024,
        num_warps=4,
    )
