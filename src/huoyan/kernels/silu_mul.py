"""silu(gate) * up, where gate and up are the halves of one product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, wait


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """In plain PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.float()).mul(up.float()).to(gate_up.dtype)


@triton.jit
def _kernel(gate_up_ptr, out_ptr, width, out_stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=ok, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + column, value.to(out_ptr.dtype.element_ty), mask=ok)


def silu_mul(gate_up: Tensor, *, in_place: bool = False) -> Tensor:
    """[T, 2 width] contiguous -> [T, width], computed in float32.

    `in_place`: written over the gates, so that the result is a view whose rows lie 2 width apart.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up[:, :width] if in_place else gate_up.new_empty(rows, width)
    overlap = gate_up.is_cuda and overlaps()
    _kernel[(rows, triton.cdiv(width, 1024))](
        gate_up,
        out,
        width,
        out.stride(0),
        BLOCK=1024,
        OVERLAP=overlap,
        num_warps=4,
        **launch_options(overlap),
    )
    return out
