"""Rotate queries and keys where they stand, and write keys and values to their slots of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, wait
from huoyan.kernels.launching import launch
from huoyan.layers.kv_numbers import LARGEST, SMALLEST_SCALE, quantize


def rope_cache_reference(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    slot_mapping: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same in plain PyTorch; see `rope_cache`. Returns the rotated qkv, writes to the cache."""
    from huoyan.layers.rope import apply_rope

    if qkv.dim() == 3:
        total = qkv.sum(0) if bias is None else qkv.sum(0) + bias.float()
        qkv = total.to(dtype or keys.dtype)
    kv_heads, head_dim = keys.shape[2], keys.shape[3]
    heads = qkv.unflatten(-1, (-1, head_dim))
    rows = table.index_select(0, positions.long())
    rotated = apply_rope(heads[:, :-kv_heads], rows[:, 0].unsqueeze(1), rows[:, 1].unsqueeze(1))
    v = heads[:, -kv_heads:]
    slots = slot_mapping.long()
    for x, cache, scales in ((rotated[:, -kv_heads:], keys, key_scales), (v, values, value_scales)):
        if scales is not None:
            x, own = quantize(x, cache.dtype, head_dim // scales.shape[-1])
            scales.view(-1, *scales.shape[2:]).index_copy_(0, slots, own)
        # As bytes where the dtype is one that torch cannot index.
        whole = cache.view(torch.uint8) if scales is not None else cache
        whole.view(-1, kv_heads, head_dim).index_copy_(0, slots, x.view(whole.dtype))
    return torch.cat((rotated, v), dim=1).flatten(1)


@triton.jit
def _scale(largest_of, LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr):
    return tl.maximum(largest_of / LARGEST, SMALLEST_SCALE).to(tl.float16)


@triton.jit
def _number(x, LARGEST: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        x = tl.floor(x + 0.5)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def _store(
    numbers_ptr, scales_ptr, row, first, second, d, ok,
    HEAD_DIM: tl.constexpr, HALF_PADDED: tl.constexpr, SCALES: tl.constexpr, LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One key or value, given as its halves; with `SCALES` groups a head, in 8 bits."""
    to = numbers_ptr + row * HEAD_DIM + d
    half: tl.constexpr = HEAD_DIM // 2
    if SCALES:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if SCALES == 1:
            scale = _scale(tl.maximum(tl.max(tl.abs(a)), tl.max(tl.abs(b))), LARGEST, SMALLEST_SCALE)
            tl.store(scales_ptr + row, scale)
            a, b = a / scale.to(tl.float32), b / scale.to(tl.float32)
        else:
            # The halves of such heads are groups without a rest, and nothing is padded.
            groups: tl.constexpr = SCALES // 2
            each: tl.constexpr = HEAD_DIM // SCALES
            a, b = tl.reshape(a, (groups, each)), tl.reshape(b, (groups, each))
            scale_a = _scale(tl.max(tl.abs(a), axis=1), LARGEST, SMALLEST_SCALE)
            scale_b = _scale(tl.max(tl.abs(b), axis=1), LARGEST, SMALLEST_SCALE)
            g = scales_ptr + row * SCALES + tl.arange(0, groups)
            tl.store(g, scale_a)
            tl.store(g + groups, scale_b)
            a = tl.reshape(a / scale_a.to(tl.float32)[:, None], (HALF_PADDED,))
            b = tl.reshape(b / scale_b.to(tl.float32)[:, None], (HALF_PADDED,))
        first, second = _number(a, LARGEST, WHOLE), _number(b, LARGEST, WHOLE)
    tl.store(to, first.to(numbers_ptr.dtype.element_ty), mask=ok)
    tl.store(to + half, second.to(numbers_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _half(qkv_ptr, bias_ptr, out_ptr, at, column, ok, all, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Half a head: as it stands, or the sum of its parts and its bias."""
    if PARTS:
        x = tl.zeros(column.shape, dtype=tl.float32)
        for part in tl.static_range(PARTS):
            x += tl.load(qkv_ptr + part * all + at, mask=ok, other=0.0)
        if HAS_BIAS:
            x += tl.load(bias_ptr + column, mask=ok, other=0.0).to(tl.float32)
        x = x.to(out_ptr.dtype.element_ty)
    else:
        x = tl.load(qkv_ptr + at, mask=ok, other=0.0)
    return x


# One form for all sizes: the fewer there are, the sooner a first start has compiled them.
@triton.jit(do_not_specialize=["tokens"])
def _kernel(
    qkv_ptr, bias_ptr, out_ptr, positions_ptr, table_ptr, slots_ptr, keys_ptr, values_ptr, key_scales_ptr,
    value_scales_ptr, tokens,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_PADDED: tl.constexpr,
    SCALES: tl.constexpr, LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = HEAD_DIM // 2
    d = tl.arange(0, HALF_PADDED)
    ok = d < half
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    column = head * HEAD_DIM + d
    at = token * width + column
    all = tokens * width
    # What a step is given is there before its first kernel: only qkv is waited for.
    slot = tl.load(slots_ptr + token).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    turns = ok & (head < HEADS + KV_HEADS)
    cos = tl.load(table_ptr + position * HEAD_DIM + d, mask=turns, other=1.0)
    sin = tl.load(table_ptr + position * HEAD_DIM + half + d, mask=turns, other=0.0)
    wait(OVERLAP)
    first = _half(qkv_ptr, bias_ptr, out_ptr, at, column, ok, all, PARTS, HAS_BIAS)
    second = _half(qkv_ptr, bias_ptr, out_ptr, at + half, column + half, ok, all, PARTS, HAS_BIAS)
    if head < HEADS + KV_HEADS:
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * cos - b * sin).to(out_ptr.dtype.element_ty)
        second = (b * cos + a * sin).to(out_ptr.dtype.element_ty)
    if PARTS or head < HEADS + KV_HEADS:
        tl.store(out_ptr + at, first, mask=ok)
        tl.store(out_ptr + at + half, second, mask=ok)
    if slot >= 0:
        if head >= HEADS + KV_HEADS:
            _store(
                values_ptr, value_scales_ptr, slot * KV_HEADS + head - HEADS - KV_HEADS, first, second, d, ok,
                HEAD_DIM, HALF_PADDED, SCALES, LARGEST, SMALLEST_SCALE, WHOLE,
            )  # fmt: skip
        elif head >= HEADS:
            _store(
                keys_ptr, key_scales_ptr, slot * KV_HEADS + head - HEADS, first, second, d, ok,
                HEAD_DIM, HALF_PADDED, SCALES, LARGEST, SMALLEST_SCALE, WHOLE,
            )  # fmt: skip


def rope_cache(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    slot_mapping: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate q and k of `qkv` in place, and store k and v in the cache.

    Args:
        qkv: [T, (heads + 2 kv_heads) * head_dim], contiguous; changed. Or float32 parts of it, [S, T, …], to be
            summed with `bias` and rounded to `dtype`.
        positions: [T] integers.
        table: float32 [positions, 2, head_dim / 2], cosines then sines.
        slot_mapping: [T] integers, block * block_size + offset; -1 leaves a token out of the cache.
        keys, values: one layer, [num_blocks, block_size, kv_heads, head_dim]; changed.
        key_scales, value_scales: of 8-bit caches, float16 [num_blocks, block_size, kv_heads, groups]; changed.
            One group a head, or an even number of them, of a head dimension that is a power of two.

    Returns:
        The rotated qkv.
    """
    kv_heads, head_dim = keys.shape[2], keys.shape[3]
    parts = qkv.shape[0] if qkv.dim() == 3 else 0
    tokens, width = qkv.shape[-2:]
    heads = width // head_dim - 2 * kv_heads
    out = torch.empty((tokens, width), dtype=dtype, device=qkv.device) if parts else qkv
    overlap = qkv.is_cuda and overlaps()
    launch(
        _kernel, (tokens, heads + 2 * kv_heads),
        qkv, qkv if bias is None else bias, out, positions, table, slot_mapping, keys, values,
        qkv if key_scales is None else key_scales, qkv if value_scales is None else value_scales, tokens,
        PARTS=parts, HAS_BIAS=bias is not None, OVERLAP=overlap,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        SCALES=0 if key_scales is None else key_scales.shape[-1], LARGEST=LARGEST.get(keys.dtype, 0.0),
        SMALLEST_SCALE=SMALLEST_SCALE, WHOLE=keys.dtype is torch.int8, num_warps=1, **launch_options(overlap),
    )  # fmt: skip
    return out
