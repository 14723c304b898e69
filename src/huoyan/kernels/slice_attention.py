"""Attention of the picture encoder: sequences packed end to end, each within itself, heads that are no power of two.

Flash attention as torch has it fills the published heads of 72 up to 96; here a head is taken as its largest power of
two and what is left, 64 and 16, so that the matrix units multiply 80.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.launching import launch

LOG2_E = 1.4426950408889634


def slice_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, bias: Tensor | None = None
) -> Tensor:
    """In plain PyTorch, in float32; see `slice_attention`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bounds = cu_seqlens.tolist()
    added = torch.zeros(3, *q.shape[1:]) if bias is None else bias.float().view(3, *q.shape[1:])
    for first, last in pairwise(bounds):
        a, b, c = (
            (x[first:last].float() + more.to(x.device)).transpose(0, 1)
            for x, more in zip((q, k, v), added, strict=True)
        )
        scores = a @ b.transpose(1, 2) / math.sqrt(q.shape[-1])
        out[first:last] = (scores.softmax(-1) @ c).transpose(0, 1).to(q.dtype)
    return out


@triton.jit
def _accumulate(
    q1, q2, k_ptr, v_ptr, start, length, stride, top, total, acc1, acc2, scale,
    HEAD: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One block of keys and values. `WHOLE`: none of its rows is beyond the sequence."""
    row = start + tl.arange(0, BLOCK_N)
    wide = tl.arange(0, WIDE)
    rest = tl.arange(0, REST)
    at = row[:, None] * stride
    in_head = (WIDE + rest)[None, :] < HEAD
    if WHOLE:
        k1 = tl.load(k_ptr + at + wide[None, :])
        k2 = tl.load(k_ptr + at + WIDE + rest[None, :], mask=in_head, other=0.0)
        v1 = tl.load(v_ptr + at + wide[None, :])
        v2 = tl.load(v_ptr + at + WIDE + rest[None, :], mask=in_head, other=0.0)
    else:
        there = row[:, None] < length
        k1 = tl.load(k_ptr + at + wide[None, :], mask=there, other=0.0)
        k2 = tl.load(k_ptr + at + WIDE + rest[None, :], mask=there & in_head, other=0.0)
        v1 = tl.load(v_ptr + at + wide[None, :], mask=there, other=0.0)
        v2 = tl.load(v_ptr + at + WIDE + rest[None, :], mask=there & in_head, other=0.0)
    scores = tl.dot(q1, tl.trans(k1))
    scores = tl.dot(q2, tl.trans(k2), scores)
    if not WHOLE:
        scores = tl.where(row[None, :] < length, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.math.exp2(scores * scale - higher[:, None])
    fade = tl.math.exp2(top - higher)
    total = total * fade + tl.sum(p, 1)
    p = p.to(v1.dtype)
    acc1 = tl.dot(p, v1, acc1 * fade[:, None])
    acc2 = tl.dot(p, v2, acc2 * fade[:, None])
    return higher, total, acc1, acc2


@triton.jit
def _kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, cu_ptr, stride, out_stride, scale,
    HAS_BIAS: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    first = tl.load(cu_ptr + tl.program_id(2))
    length = tl.load(cu_ptr + tl.program_id(2) + 1) - first
    begin = tl.program_id(0) * BLOCK_M
    if begin >= length:
        return
    first = first.to(tl.int64)
    k_ptr += first * stride + head * HEAD
    v_ptr += first * stride + head * HEAD
    row = begin + tl.arange(0, BLOCK_M)
    wide = tl.arange(0, WIDE)
    rest = tl.arange(0, REST)
    there = row[:, None] < length
    in_head = (WIDE + rest)[None, :] < HEAD
    at = q_ptr + first * stride + head * HEAD + row[:, None] * stride
    q1 = tl.load(at + wide[None, :], mask=there, other=0.0)
    q2 = tl.load(at + WIDE + rest[None, :], mask=there & in_head, other=0.0)
    if HAS_BIAS:
        own = bias_ptr + head * HEAD
        q1 = (q1.to(tl.float32) + tl.load(own + wide).to(tl.float32)[None, :]).to(q1.dtype)
        more = tl.load(own + WIDE + rest, mask=WIDE + rest < HEAD, other=0.0).to(tl.float32)
        q2 = (q2.to(tl.float32) + more[None, :]).to(q2.dtype)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc1 = tl.zeros((BLOCK_M, WIDE), tl.float32)
    acc2 = tl.zeros((BLOCK_M, REST), tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        top, total, acc1, acc2 = _accumulate(
            q1, q2, k_ptr, v_ptr, start, length, stride, top, total, acc1, acc2, scale,
            HEAD, WIDE, REST, BLOCK_N, True,
        )  # fmt: skip
    if whole < length:
        top, total, acc1, acc2 = _accumulate(
            q1, q2, k_ptr, v_ptr, whole, length, stride, top, total, acc1, acc2, scale,
            HEAD, WIDE, REST, BLOCK_N, False,
        )  # fmt: skip
    acc1 = acc1 / total[:, None]
    acc2 = acc2 / total[:, None]
    if HAS_BIAS:
        # A key's bias moves all scores of a query alike, and weights sum up to one: a value's bias comes out whole.
        own = bias_ptr + (2 * heads + head) * HEAD
        acc1 += tl.load(own + wide).to(tl.float32)[None, :]
        acc2 += tl.load(own + WIDE + rest, mask=WIDE + rest < HEAD, other=0.0).to(tl.float32)[None, :]
    dtype = out_ptr.dtype.element_ty
    into = out_ptr + first * out_stride + head * HEAD + row[:, None] * out_stride
    tl.store(into + wide[None, :], acc1.to(dtype), mask=there)
    tl.store(into + WIDE + rest[None, :], acc2.to(dtype), mask=there & in_head)


def takes(head_dim: int) -> bool:
    """Whether a head of this width is one power of two and a rest of at most 16, all of it whole runs of 16 bytes."""
    wide = 1 << (head_dim.bit_length() - 1)
    return head_dim % 8 == 0 and 32 <= wide <= 64 and 0 < head_dim - wide <= 16


def slice_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, bias: Tensor | None = None,
    *, over: bool = False, block_m: int = 128, block_n: int = 64, warps: int = 4, stages: int = 3,
) -> Tensor:  # fmt: skip
    """Attention of each sequence's queries over all of its own keys.

    Args:
        q, k, v: float16 or bfloat16 [sum of lengths, heads, head_dim], all three of one row stride, heads side by side;
            head_dim as `takes` says.
        cu_seqlens: int32 [sequences + 1], where each sequence begins.
        longest: the length of the longest.
        bias: [3 * heads * head_dim], still to be added to q, k and v.
        over: write the answers over q. A program reads no queries but those that its answers take the place of.
        block_m, block_n, warps, stages: how it is cut (searched on an H100, see benchmarks/NOTES.md).

    Returns:
        [sum of lengths, heads, head_dim], contiguous, or q.
    """
    rows, heads, head_dim = q.shape
    assert takes(head_dim)
    assert q.stride() == k.stride() == v.stride() == (q.stride(0), head_dim, 1)
    out = q if over else torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    wide = 1 << (head_dim.bit_length() - 1)
    grid = (triton.cdiv(longest, block_m), heads, len(cu_seqlens) - 1)
    launch(
        _kernel, grid,
        q, k, v, q if bias is None else bias, out, cu_seqlens, q.stride(0), out.stride(0),
        LOG2_E / math.sqrt(head_dim), HAS_BIAS=bias is not None, HEAD=head_dim, WIDE=wide, REST=16, BLOCK_M=block_m,
        BLOCK_N=block_n, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out
