"""Two steps of the decoder between its matrix products, forwards and backwards in one Triton kernel each.

In plain PyTorch they pass over their tensors a dozen times and are a good part of a step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.layers.rope import RotaryTable, apply_rope


@triton.jit
def _rotate_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS + 2 * KV_HEADS)[:, None]
    j = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + row * HALF + j)
    # Backwards the same angle is turned the other way.
    sin = tl.load(sin_ptr + row * HALF + j) * (-1.0 if BACK else 1.0)
    is_q, is_v = head < HEADS, head >= HEADS + KV_HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    whole = qkv_ptr + (row * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + j
    q = q_ptr + (row * HEADS + head) * 2 * HALF + j
    k = k_ptr + (row * KV_HEADS + head - HEADS) * 2 * HALF + j
    v = v_ptr + (row * KV_HEADS + head - HEADS - KV_HEADS) * 2 * HALF + j
    # Masks need the shape of what they mask.
    of_q, of_k, of_v = is_q & (j < HALF), is_k & (j < HALF), is_v & (j < HALF)
    if BACK:
        first = tl.load(q, mask=of_q, other=0.0).to(tl.float32)
        first += tl.load(k, mask=of_k, other=0.0).to(tl.float32)
        first += tl.load(v, mask=of_v, other=0.0).to(tl.float32)
        second = tl.load(q + HALF, mask=of_q, other=0.0).to(tl.float32)
        second += tl.load(k + HALF, mask=of_k, other=0.0).to(tl.float32)
        second += tl.load(v + HALF, mask=of_v, other=0.0).to(tl.float32)
    else:
        first, second = tl.load(whole).to(tl.float32), tl.load(whole + HALF).to(tl.float32)
    a = tl.where(is_v, first, first * cos - second * sin)
    b = tl.where(is_v, second, second * cos + first * sin)
    a, b = a.to(qkv_ptr.dtype.element_ty), b.to(qkv_ptr.dtype.element_ty)
    if BACK:
        tl.store(whole, a)
        tl.store(whole + HALF, b)
    else:
        tl.store(q, a, mask=of_q)
        tl.store(q + HALF, b, mask=of_q)
        tl.store(k, a, mask=of_k)
        tl.store(k + HALF, b, mask=of_k)
        tl.store(v, a, mask=of_v)
        tl.store(v + HALF, b, mask=of_v)


class _SplitRotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, half = len(qkv), cos.shape[-1]
        qkv = qkv.contiguous()
        cos, sin = (t.reshape(rows, half).contiguous() for t in (cos, sin))
        q = qkv.new_empty(rows, heads, 2 * half)
        k, v = (qkv.new_empty(rows, kv_heads, 2 * half) for _ in range(2))
        _rotate_kernel[(rows,)](qkv, q, k, v, cos, sin, heads, kv_heads, half, False, num_warps=2)
        ctx.save_for_backward(cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        q, k, v = (g.contiguous() for g in grads)
        rows, heads, kv_heads, half = len(q), q.shape[1], k.shape[1], cos.shape[-1]
        out = q.new_empty(rows, (heads + 2 * kv_heads) * 2 * half)
        _rotate_kernel[(rows,)](out, q, k, v, cos, sin, heads, kv_heads, half, True, num_warps=2)
        return out, None, None, None, None


def split_rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (heads + 2 kv_heads) * head_dim], cos and sin [T, 1, head_dim / 2] -> q, k, v by head, q and k rotated.

    head_dim and heads + 2 kv_heads are powers of two.
    """
    q, k, v = _SplitRotated.apply(qkv, cos, sin, heads, kv_heads)
    return q, k, v


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, grad_ptr, width, BACK: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < width
    at = gate_up_ptr + row * 2 * width + column
    gate = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=ok, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    kind = out_ptr.dtype.element_ty
    if BACK:
        grad = tl.load(grad_ptr + row * width + column, mask=ok, other=0.0).to(tl.float32)
        to = out_ptr + row * 2 * width + column
        of_gate = grad * up * share * (1.0 + gate * (1.0 - share))
        tl.store(to, of_gate.to(kind), mask=ok)
        tl.store(to + width, (grad * gate * share).to(kind), mask=ok)
    else:
        tl.store(out_ptr + row * width + column, (gate * share * up).to(kind), mask=ok)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        block = triton.next_power_of_2(width)
        _silu_mul_kernel[(rows,)](gate_up, out, out, width, False, block, num_warps=4)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        out = torch.empty_like(gate_up)
        width = gate_up.shape[1] // 2
        block = triton.next_power_of_2(width)
        grad = grads[0].contiguous()
        _silu_mul_kernel[(len(out),)](gate_up, out, grad, width, True, block, num_warps=4)
        return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the halves of [T, 2 width] -> [T, width]."""
    out: Tensor = _SiluMul.apply(gate_up)
    return out


def check(
    heads: int,
    kv_heads: int,
    head_dim: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    rows: int = 1000,
) -> None:
    """AssertionError unless both kernels, forwards and backwards, give what float32 gives but for one rounding.

    In a whole step a mistake of theirs would be hard to tell from what rounding makes of it.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    positions = torch.randint(0, 1000, (rows,), generator=generator).to(device)
    cos, sin = RotaryTable(head_dim, 1e6, 1000).lookup(positions)

    def rotate(qkv: Tensor) -> Tensor:
        by_head = qkv.unflatten(-1, (-1, head_dim))
        turned = apply_rope(by_head[:, : heads + kv_heads], cos, sin)
        return torch.cat((turned, by_head[:, heads + kv_heads :]), dim=1)

    def gate(gate_up: Tensor) -> Tensor:
        first, second = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(first) * second

    pairs = (
        (rotate, lambda x: torch.cat(split_rotated(x, cos, sin, heads, kv_heads), dim=1)),
        (gate, silu_mul),
    )
    inputs = (random(rows, (heads + 2 * kv_heads) * head_dim), 3 * random(rows, 2 * width))
    for (plain, ours), x in zip(pairs, inputs, strict=True):
        results = []
        for function, own in ((plain, x.float().requires_grad_()), (ours, x.clone().requires_grad_())):
            out = function(own)
            weight = torch.linspace(-2, 2, out.numel(), device=device).view_as(out).to(dtype).to(out.dtype)
            (gradient,) = torch.autograd.grad(out, own, weight)
            results.append((out.detach().float(), gradient.float()))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-3)
