"""Rotate queries and keys where they stand, and write keys and values to their slots of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rope_cache_reference(
    qkv: Tensor, positions: Tensor, table: Tensor, slot_mapping: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The same in plain PyTorch; see `rope_cache`. Returns the rotated qkv, writes to the cache."""
    from huoyan.layers.rope import apply_rope

    kv_heads, head_dim = keys.shape[2], keys.shape[3]
    heads = qkv.unflatten(-1, (-1, head_dim))
    rows = table.index_select(0, positions.long())
    rotated = apply_rope(heads[:, :-kv_heads], rows[:, 0].unsqueeze(1), rows[:, 1].unsqueeze(1))
    v = heads[:, -kv_heads:]
    keys.view(-1, kv_heads, head_dim).index_copy_(0, slot_mapping.long(), rotated[:, -kv_heads:])
    values.view(-1, kv_heads, head_dim).index_copy_(0, slot_mapping.long(), v)
    return torch.cat((rotated, v), dim=1).flatten(1)


@triton.jit
def _kernel(
    qkv_ptr, positions_ptr, table_ptr, slots_ptr, keys_ptr, values_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_PADDED: tl.constexpr,
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
            to = values_ptr + (slot * KV_HEADS + head - HEADS - KV_HEADS) * HEAD_DIM + d
            tl.store(to, first, mask=ok)
            tl.store(to + half, second, mask=ok)
        elif head >= HEADS:
            to = keys_ptr + (slot * KV_HEADS + head - HEADS) * HEAD_DIM + d
            tl.store(to, first, mask=ok)
            tl.store(to + half, second, mask=ok)


def rope_cache(
    qkv: Tensor, positions: Tensor, table: Tensor, slot_mapping: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate q and k of `qkv` in place, and store k and v in the cache.

    Args:
        qkv: [T, (heads + 2 kv_heads) * head_dim], contiguous; changed.
        positions: [T] integers.
        table: float32 [positions, 2, head_dim / 2], cosines then sines.
        slot_mapping: [T] integers, block * block_size + offset; -1 leaves a token out of the cache.
        keys, values: one layer, [num_blocks, block_size, kv_heads, head_dim]; changed.
    """
    kv_heads, head_dim = keys.shape[2], keys.shape[3]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    _kernel[(qkv.shape[0], heads + 2 * kv_heads)](
        qkv, positions, table, slot_mapping, keys, values,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )  # fmt: skip
    return qkv
