"""Attention of prompts' chunks over the blocks of the KV cache, what came before the chunk and the chunk itself.

Queries are taken in tiles that the host lists (flash attention: Dao et al. 2022), so that nothing is launched for
queries that are not there, and a captured launch serves any chunks that have no more tiles than it has room for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.cached_rows import cached_sequence, load_rows
from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, wait
from huoyan.kernels.launching import launch

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOG2_E = 1.4426950408889634


def prefill_tiles(
    cu_seqlens_q: NDArray[np.int64], seq_lens: NDArray[np.int64], first: int, queries: int
) -> NDArray[np.int32]:
    """The tiles of chunks `first` and later, those with most to attend to first.

    Args:
        cu_seqlens_q: [S + 1] chunk i is rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of the step.
        seq_lens: [S] tokens that the chunk's last token attends to, itself included.
        queries: the most of a tile.

    Returns:
        int32 [tiles, 4]: chunk, first row, rows, position of the first.
    """
    starts, lengths = cu_seqlens_q[first:-1], np.diff(cu_seqlens_q[first:])
    counts = -(-lengths // queries)
    owner = np.repeat(np.arange(len(counts)), counts)
    begin_at = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * queries
    past = seq_lens[first:] - lengths
    tiles = np.stack(
        (
            owner + first,
            starts[owner] + begin_at,
            np.minimum(lengths[owner] - begin_at, queries),
            past[owner] + begin_at,
        ),
        axis=1,
    ).astype(np.int32)
    return tiles[np.argsort(-tiles[:, 3], kind="stable")]


def paged_prefill_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    tiles: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, float32, a tile at a time; rows of no tile are zeros."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for chunk, first, rows, position in tiles.tolist():
        length = position + rows
        own = q[first : first + rows].float().transpose(0, 1)
        k = cached_sequence(keys, key_scales, block_tables[chunk], length)
        v = cached_sequence(values, value_scales, block_tables[chunk], length)
        k, v = (x.repeat_interleave(len(own) // len(x), 0) for x in (k, v))
        scores = own @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        at = torch.arange(length, device=q.device)
        scores.masked_fill_(at > at[position:, None], float("-inf"))
        out[first : first + rows] = (scores.softmax(-1) @ v).transpose(0, 1).to(q.dtype)
    return out


@triton.jit
def _accumulate(
    q, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr, head, start, end, positions,
    top, total, acc, scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr, SCALES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values. `WHOLE`: every query sees all of it."""
    token = start + tl.arange(0, KEYS)
    d = tl.arange(0, DIM_PADDED)
    if WHOLE:
        block = tl.load(table_ptr + token // BLOCK_SIZE).to(tl.int64)
    else:
        block = tl.load(table_ptr + token // BLOCK_SIZE, mask=token < end, other=0).to(tl.int64)
    at = (block * BLOCK_SIZE + token % BLOCK_SIZE) * KV_HEADS + head
    if WHOLE and HEAD_DIM == DIM_PADDED and SCALES == 0:
        k = tl.load(keys_ptr + at[:, None] * HEAD_DIM + d[None, :])
        v = tl.load(values_ptr + at[:, None] * HEAD_DIM + d[None, :])
    else:
        ok = (token < end)[:, None] & (d < HEAD_DIM)[None, :]
        k = load_rows(keys_ptr, key_scales_ptr, at, d, ok, q, HEAD_DIM, SCALES)
        v = load_rows(values_ptr, value_scales_ptr, at, d, ok, q, HEAD_DIM, SCALES)
    scores = tl.dot(q, tl.trans(k))
    if not WHOLE:
        scores = tl.where(token[None, :] <= positions[:, None], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.math.exp2(scores * scale - higher[:, None])
    fade = tl.math.exp2(top - higher)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
    return higher, total, acc


@triton.jit
def _kernel(
    q_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, tables_ptr, tiles_ptr, out_ptr,
    scale, q_stride, out_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SCALES: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    # Tiles and blocks are a step's inputs, there before its first kernel.
    tile = tiles_ptr + tl.program_id(1) * 4
    rows = tl.load(tile + 2)
    # Also where there is no tile: what comes next waits for this kernel alone.
    wait(OVERLAP)
    if rows > 0:
        table_ptr = tables_ptr + tl.load(tile).to(tl.int64) * table_stride
        first = tl.load(tile + 1).to(tl.int64)
        position = tl.load(tile + 3)
        q_head = tl.program_id(0)
        head = q_head // GROUP
        m = tl.arange(0, QUERIES)
        d = tl.arange(0, DIM_PADDED)
        ok = (m < rows)[:, None] & (d < HEAD_DIM)[None, :]
        # Rows that are not there see what the last one sees, so that none sees nothing.
        positions = position + tl.minimum(m, rows - 1)
        end = position + rows
        at = (first + m)[:, None] * q_stride + q_head * HEAD_DIM + d[None, :]
        q = tl.load(q_ptr + at, mask=ok, other=0.0)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, DIM_PADDED), tl.float32)
        whole = (position + 1) // KEYS * KEYS
        for start in tl.range(0, whole, KEYS, num_stages=STAGES):
            top, total, acc = _accumulate(
                q, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr, head, start, end,
                positions, top, total, acc, scale,
                KV_HEADS, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, KEYS, SCALES, True,
            )  # fmt: skip
        for start in tl.range(whole, end, KEYS, num_stages=STAGES):
            top, total, acc = _accumulate(
                q, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr, head, start, end,
                positions, top, total, acc, scale,
                KV_HEADS, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, KEYS, SCALES, False,
            )  # fmt: skip
        into = (first + m)[:, None] * out_stride + q_head * HEAD_DIM + d[None, :]
        tl.store(out_ptr + into, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=ok)


def paged_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    tiles: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    *,
    queries: int,
    out: Tensor | None = None,
    tile_keys: int = 64,
    warps: int = 4,
    stages: int | None = None,
) -> Tensor:
    """Causal attention of chunks whose keys and values are in the cache already.

    Args:
        q: [T, heads, head_dim] of the step, each row contiguous.
        keys, values: one layer of the cache, [num_blocks, block_size, kv_heads, head_dim].
        block_tables: int32 [S, most blocks].
        tiles: int32 [tiles, 4], see `prefill_tiles`; one of no rows is none.
        key_scales, value_scales: of 8-bit caches, float16 [num_blocks, block_size, kv_heads, groups].
        queries: the most of a tile, as they were made.
        out: [T, heads, head_dim], contiguous, where answers go; other rows stay as they are.
        tile_keys, warps, stages: how it is cut (searched on an H100, see benchmarks/NOTES.md).

    Returns:
        `out`, or a new tensor, whose rows of no tile are anything.
    """
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = keys.shape[1], keys.shape[2]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    overlap = q.is_cuda and overlaps()
    # Small tiles leave room for more programs instead of more keys under way.
    stages = stages or (3 if queries > 64 else 2)
    launch(
        _kernel, (heads, len(tiles)),
        q, keys, values, q if key_scales is None else key_scales, q if value_scales is None else value_scales,
        block_tables, tiles, out, head_dim**-0.5 * LOG2_E, q.stride(0), out.stride(0), block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim,
        DIM_PADDED=max(16, triton.next_power_of_2(head_dim)), BLOCK_SIZE=block_size, QUERIES=queries,
        KEYS=tile_keys, SCALES=0 if key_scales is None else key_scales.shape[-1], STAGES=stages, OVERLAP=overlap,
        num_warps=warps, **launch_options(overlap),
    )  # fmt: skip
    return out
