"""Steps between the matrix products: one kernel each on CUDA, plain PyTorch elsewhere and where gradients flow."""

from __future__ import annotations

import torch
from torch import Tensor

from huoyan.kernels import decode_kernels_enabled
from huoyan.layers.norm import LayerNorm, RMSNorm
from huoyan.planning.pieces import FEW_ROWS


def add_norm(
    norm: RMSNorm | LayerNorm,
    x: Tensor,
    residual: Tensor | None,
    over: bool = False,
    added: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual) for [T, width]; without a residual the second is x.

    On CUDA, before an RMS norm, x may be float32 parts, [S, T, width], whose sum is meant. Before a layer norm the sum
    is written over the residual, and on CUDA the norm over x, where nothing is to be differentiated: of the encoder's
    patches there are many. `over`: of an RMS norm of many rows the same, where nobody reads x and residual again.
    `added`: before a layer norm with a residual, a bias [width] that x still lacks. `out`: of an RMS norm, [T, width]
    where the first goes; nothing is to be differentiated then.
    """
    if _use_kernel(x):
        if isinstance(norm, LayerNorm):
            from huoyan.kernels.add_layer_norm import add_layer_norm

            return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, added)
        from huoyan.kernels.add_rms_norm import add_rms_norm

        over = over and x.dim() == 2 and len(x) > FEW_ROWS and not torch.is_grad_enabled()
        return add_rms_norm(x, residual, norm.weight, norm.eps, over=over, out=out)
    if added is not None:
        x = x + added
    if residual is None:
        total = x
    else:
        in_place = isinstance(norm, LayerNorm) and not torch.is_grad_enabled()
        total = residual.add_(x) if in_place else x + residual
    normed = norm(total)
    return (normed if out is None else out.copy_(normed)), total


def silu_mul(gate_up: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """silu(gate) * up of the halves of [T, 2 width] -> [T, width]; `gate_up` may be used up.

    On CUDA gate_up may be float32 parts, [S, T, 2 width], whose sum is meant; `dtype` is then that of the result.
    """
    if _use_kernel(gate_up):
        from huoyan.kernels import silu_mul as kernel

        # Of a prompt these are a step's widest tensors, and its product takes rows wherever they are; the kernels of
        # few rows want them side by side.
        in_place = gate_up.dim() == 2 and len(gate_up) > FEW_ROWS and dtype in (None, gate_up.dtype)
        return kernel.silu_mul(gate_up, dtype, in_place=in_place)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_mul_over(gate: Tensor, up: Tensor) -> None:
    """gate [T, width] becomes silu(gate) * up; rows of either may lie apart."""
    if gate.is_cuda and decode_kernels_enabled():
        from huoyan.kernels.silu_mul import silu_mul_over as kernel

        kernel(gate, up)
        return
    torch.nn.functional.silu(gate, inplace=True).mul_(up)


def _use_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.is_contiguous() and not (torch.is_grad_enabled() and x.requires_grad)
