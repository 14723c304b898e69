"""Steps between the matrix products: one kernel each on CUDA, plain PyTorch elsewhere and where gradients flow."""

from __future__ import annotations

import torch
from torch import Tensor

from huoyan.layers.norm import RMSNorm


def add_norm(norm: RMSNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual) for [T, width]; without a residual the second is x."""
    if _use_kernel(x):
        from huoyan.kernels.add_rms_norm import add_rms_norm

        return add_rms_norm(x, residual, norm.weight, norm.eps)
    total = x if residual is None else x + residual
    return norm(total), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the halves of [T, 2 width] -> [T, width]; `gate_up` may be used up."""
    if _use_kernel(gate_up):
        from huoyan.kernels import silu_mul as kernel

        # A step's widest tensors are these: the product takes its input with rows wherever they are.
        return kernel.silu_mul(gate_up, in_place=True)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _use_kernel(x: Tensor) -> bool:
    return (
        x.is_cuda and x.dim() == 2 and x.is_contiguous() and not (torch.is_grad_enabled() and x.requires_grad)
    )
