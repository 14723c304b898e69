"""Rotate queries and keys where they stand, and write keys and values to their slots of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
) -> Tensor:
    """The same in plain PyTorch; see `rope_cache`. Returns the rotated qkv, writes to the cache."""
    from huoyan.layers.rope import apply_rope

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
def _kernel(
    qkv_ptr, positions_ptr, table_ptr, slots_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_PADDED: tl.constexpr,
    SCALES: tl.constexpr, LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = HEAD_DIM // 2
    d = tl.arange(0, HALF_PADDED)
    ok = d < half
    at = qkv_ptr + token * (HEADS + 2 * KV_HEADS) * HEAD_DIM + head * HEAD_DIM + d
    first = tl.load(at, mask=ok, other=0.0)
    second = tl.load(at + half, mask=ok, other=0.0)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if head < HEADS + KV_HEADS:
        position = tl.load(positions_ptr + token).to(tl.int64)
        cos = tl.load(table_ptr + position * HEAD_DIM + d, mask=ok, other=0.0)
        sin = tl.load(table_ptr + position * HEAD_DIM + half + d, mask=ok, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * cos - b * sin).to(qkv_ptr.dtype.element_ty)
        second = (b * cos + a * sin).to(qkv_ptr.dtype.element_ty)
        tl.store(at, first, mask=ok)
        tl.store(at + half, second, mask=ok)
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
) -> Tensor:
    """Rotate q and k of `qkv` in place, and store k and v in the cache.

    Args:
        qkv: [T, (heads + 2 kv_heads) * head_dim], contiguous; changed.
        positions: [T] integers.
        table: float32 [positions, 2, head_dim / 2], cosines then sines.
        slot_mapping: [T] integers, block * block_size + offset; -1 leaves a token out of the cache.
        keys, values: one layer, [num_blocks, block_size, kv_heads, head_dim]; changed.
        key_scales, value_scales: of 8-bit caches, float16 [num_blocks, block_size, kv_heads, groups]; changed.
            One group a head, or an even number of them, of a head dimension that is a power of two.
    """
    kv_heads, head_dim = keys.shape[2], keys.shape[3]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    _kernel[(qkv.shape[0], heads + 2 * kv_heads)](
        qkv, positions, table, slot_mapping, keys, values,
        qkv if key_scales is None else key_scales, qkv if value_scales is None else value_scales,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        SCALES=0 if key_scales is None else key_scales.shape[-1], LARGEST=LARGEST.get(keys.dtype, 0.0),
        SMALLEST_SCALE=SMALLEST_SCALE, WHOLE=keys.dtype is torch.int8, num_warps=1,
    )  # fmt: skip
    return qkv
