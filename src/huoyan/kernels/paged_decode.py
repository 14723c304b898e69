"""Attention of one new token a sequence over the blocks of the KV cache, split over the context.

Each program takes one key head of one sequence, with all query heads that share it, and one part of the context
(flash decoding: Dao et al. 2023); a second kernel joins the parts. The number of parts depends on the batch size
only, so that the launch can be captured in a CUDA graph and replayed for any lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.cached_rows import cached_sequence, load_rows
from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, prefetch_lines, wait

TILE = 64
"""Tokens a program takes at a time."""
MAX_PARTS = 32


def paged_decode_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, float32, a sequence at a time."""
    out = torch.empty_like(q)
    for row, length in enumerate(seq_lens.tolist()):
        k = cached_sequence(keys, key_scales, block_tables[row], length)
        v = cached_sequence(values, value_scales, block_tables[row], length)
        grouped = q[row].float().unflatten(0, (len(k), -1))
        scores = grouped @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        out[row] = (scores.softmax(-1) @ v).flatten(0, 1).to(q.dtype)
    return out


def parts_for(batch: int, kv_heads: int, processors: int = 132) -> int:
    """Parts of the context: enough programs to fill the device about twice, a power of two."""
    wanted = max(1, 2 * processors // (batch * kv_heads))
    return min(MAX_PARTS, 1 << (wanted.bit_length() - 1))


@triton.jit
def _part_kernel(
    q_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, tables_ptr, lens_ptr,
    out_ptr, part_out_ptr, part_max_ptr, part_sum_ptr,
    scale, q_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    SCALES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    # Lengths and blocks are a step's inputs, there before its first kernel.
    length = tl.load(lens_ptr + row)
    tiles = tl.cdiv(length, TILE)
    tiles_a_part = tl.cdiv(tiles, PARTS)
    first = part * tiles_a_part * TILE
    last = tl.minimum(first + tiles_a_part * TILE, length)
    g = tl.arange(0, GROUP_PADDED)
    d = tl.arange(0, DIM_PADDED)
    t = tl.arange(0, TILE)
    d_ok = d < HEAD_DIM
    q_ok = (g < GROUP)[:, None] & d_ok[None, :]
    q_heads = head * GROUP + g
    if OVERLAP:  # noqa: SIM102, known when compiled and known when run
        if length > 0:
            token = tl.minimum(first + t, length - 1)
            block = tl.load(tables_ptr + row * table_stride + token // BLOCK_SIZE).to(tl.int64)
            at = (block * BLOCK_SIZE + token % BLOCK_SIZE) * KV_HEADS + head
            line = tl.arange(0, 2) * (HEAD_DIM // 2)
            prefetch_lines(keys_ptr + at[:, None] * HEAD_DIM + line[None, :])
            prefetch_lines(values_ptr + at[:, None] * HEAD_DIM + line[None, :])
    # Also where there is no sequence: what comes next waits for this kernel alone.
    wait(OVERLAP)
    if length > 0:
        q = tl.load(q_ptr + row * q_stride + q_heads[:, None] * HEAD_DIM + d[None, :], mask=q_ok, other=0.0)
        q = (q.to(tl.float32) * (scale * 1.4426950408889634)).to(q.dtype)
        top = tl.full((GROUP_PADDED,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((GROUP_PADDED,), dtype=tl.float32)
        acc = tl.zeros((GROUP_PADDED, DIM_PADDED), dtype=tl.float32)
        for start in range(first, last, TILE):
            token = start + t
            ok = token < last
            block = tl.load(tables_ptr + row * table_stride + token // BLOCK_SIZE, mask=ok, other=0).to(
                tl.int64
            )
            at = (block * BLOCK_SIZE + token % BLOCK_SIZE) * KV_HEADS + head
            kv_ok = ok[:, None] & d_ok[None, :]
            k = load_rows(keys_ptr, key_scales_ptr, at, d, kv_ok, q, HEAD_DIM, SCALES)
            scores = tl.dot(q, tl.trans(k))
            scores = tl.where(ok[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(scores - new_top[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            v = load_rows(values_ptr, value_scales_ptr, at, d, kv_ok, q, HEAD_DIM, SCALES)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
            top = new_top
        g_ok = g < GROUP
        if PARTS == 1:
            result = acc / total[:, None]
            out_at = (row * KV_HEADS * GROUP + q_heads[:, None]) * HEAD_DIM + d[None, :]
            tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=q_ok)
        else:
            head_row = (row * KV_HEADS * GROUP + q_heads) * PARTS + part
            tl.store(part_max_ptr + head_row, top, mask=g_ok)
            tl.store(part_sum_ptr + head_row, total, mask=g_ok)
            tl.store(part_out_ptr + head_row[:, None] * HEAD_DIM + d[None, :], acc, mask=q_ok)


@triton.jit
def _join_kernel(
    out_ptr, part_out_ptr, part_max_ptr, part_sum_ptr, lens_ptr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    head_row = tl.program_id(0)
    length = tl.load(lens_ptr + head_row // HEADS)
    wait(OVERLAP)
    if length > 0:
        part = tl.arange(0, PARTS)
        d = tl.arange(0, DIM_PADDED)
        d_ok = d < HEAD_DIM
        top = tl.load(part_max_ptr + head_row * PARTS + part)
        weight = tl.exp2(top - tl.max(top, axis=0))
        total = tl.sum(tl.load(part_sum_ptr + head_row * PARTS + part) * weight, axis=0)
        at = (head_row * PARTS + part)[:, None] * HEAD_DIM + d[None, :]
        parts = tl.load(part_out_ptr + at, mask=d_ok[None, :], other=0.0)
        result = tl.sum(parts * weight[:, None], axis=0) / total
        tl.store(out_ptr + head_row * HEAD_DIM + d, result.to(out_ptr.dtype.element_ty), mask=d_ok)


def paged_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    *,
    parts: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query row a sequence.

    Args:
        q: [B, heads, head_dim], each row contiguous.
        keys, values: one layer of the cache, [num_blocks, block_size, kv_heads, head_dim].
        block_tables: int32 [B, most blocks].
        seq_lens: int32 [B], tokens to attend to, the new one (written already) included; 0 where no sequence is.
        key_scales, value_scales: of 8-bit caches, float16 [num_blocks, block_size, kv_heads, groups].
        parts: of the context, a power of two; by default as `parts_for` says.
        out: [B, heads, head_dim], contiguous, where answers go; rows of no sequence stay as they are.

    Returns:
        `out`, or a new tensor in the dtype of q.
    """
    batch, heads, head_dim = q.shape
    block_size, kv_heads = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    parts = parts or parts_for(batch, kv_heads)
    if out is None:
        out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    shape = (batch, heads, parts) if parts > 1 else (1, 1, 1)
    part_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    part_max = torch.empty(shape, dtype=torch.float32, device=q.device)
    part_sum = torch.empty(shape, dtype=torch.float32, device=q.device)
    padded = max(16, triton.next_power_of_2(head_dim))
    overlap = q.is_cuda and overlaps()
    _part_kernel[(batch, kv_heads, parts)](
        q, keys, values, q if key_scales is None else key_scales, q if value_scales is None else value_scales,
        block_tables, seq_lens, out, part_out, part_max, part_sum,
        head_dim**-0.5, q.stride(0), block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, GROUP_PADDED=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim,
        DIM_PADDED=padded, BLOCK_SIZE=block_size, PARTS=parts, TILE=TILE,
        SCALES=0 if key_scales is None else key_scales.shape[-1], OVERLAP=overlap, num_warps=4, num_stages=3,
        **launch_options(overlap),
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(batch * heads,)](
            out, part_out, part_max, part_sum, seq_lens, HEADS=heads, HEAD_DIM=head_dim, DIM_PADDED=padded,
            PARTS=parts, OVERLAP=overlap, num_warps=4, **launch_options(overlap),
        )  # fmt: skip
    return out
