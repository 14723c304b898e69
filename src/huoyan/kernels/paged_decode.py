"""Attention of one new token a sequence over the blocks of the KV cache, split over the context.

Each program takes one key head of one sequence, with all query heads that share it, and one part of the context
(flash decoding: Dao et al. 2023); the last of them to come joins the parts, always in the same order. (A kernel for
that, with the hand-over to it, took longer than the parts of a short context.) The number of parts depends on the batch
size only, so that the launch can be captured in a CUDA graph and replayed for any lengths; where the context is too
short for so many, the others do nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.arrivals import arrivals
from huoyan.kernels.cached_rows import cached_sequence, load_rows
from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, prefetch_lines, wait
from huoyan.kernels.launching import launch

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
def _store(result, out_ptr, out_at, q_ok):
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=q_ok)


@triton.jit
def _joined(
    part_out_ptr, part_max_ptr, part_sum_ptr, first_part, working, g, d, q_ok,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The answer [query heads, head_dim] of a row and key head, whose `working` parts lie from `first_part` on.

    The maximum runs along, as within a part: with all maxima first, their weights would have to change between the
    threads before each part, which the loads of the next one wait for. What lies in the L1 cache may be older than what
    other programs wrote, so all is read past it; one's own part too, as the result must not depend on whose it is.
    """
    # So many are on their way at a time: the way is long, and all of them would take too many registers.
    AT_ONCE: tl.constexpr = 4
    # Heads that are only padding read another's numbers: with none they would be nan.
    held = tl.minimum(g, GROUP - 1)
    top = tl.full((g.shape[0],), float("-inf"), dtype=tl.float32)
    total = tl.zeros((g.shape[0],), dtype=tl.float32)
    acc = tl.zeros((g.shape[0], d.shape[0]), dtype=tl.float32)
    for start in tl.range(0, working, AT_ONCE, num_stages=1):
        for i in tl.static_range(AT_ONCE):
            there = start + i < working
            at = (first_part + start + i) * GROUP
            part_top = tl.load(
                part_max_ptr + at + held, mask=there, other=float("-inf"), cache_modifier=".cg"
            )
            part_total = tl.load(part_sum_ptr + at + held, mask=there, other=0.0, cache_modifier=".cg")
            x_at = (at + g)[:, None] * HEAD_DIM + d[None, :]
            x = tl.load(part_out_ptr + x_at, mask=q_ok & there, other=0.0, cache_modifier=".cg")
            new_top = tl.maximum(top, part_top)
            shrink = tl.exp2(top - new_top)
            weight = tl.exp2(part_top - new_top)
            total = total * shrink + part_total * weight
            acc = acc * shrink[:, None] + x * weight[:, None]
            top = new_top
    return acc / total[:, None]


@triton.jit
def _decode_kernel(
    q_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, tables_ptr, lens_ptr,
    out_ptr, part_out_ptr, part_max_ptr, part_sum_ptr, arrived_ptr,
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
        if first < length:
            token = tl.minimum(first + t, length - 1)
            block = tl.load(tables_ptr + row * table_stride + token // BLOCK_SIZE).to(tl.int64)
            at = (block * BLOCK_SIZE + token % BLOCK_SIZE) * KV_HEADS + head
            line = tl.arange(0, 2) * (HEAD_DIM // 2)
            prefetch_lines(keys_ptr + at[:, None] * HEAD_DIM + line[None, :])
            prefetch_lines(values_ptr + at[:, None] * HEAD_DIM + line[None, :])
    # Also where there is nothing to do: what comes next waits for this kernel alone.
    wait(OVERLAP)
    if first < length:
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
        out_at = (row * KV_HEADS * GROUP + q_heads[:, None]) * HEAD_DIM + d[None, :]
        working = tl.cdiv(tiles, tiles_a_part)
        if PARTS == 1:  # noqa: SIM114, known when compiled and known when run
            _store(acc / total[:, None], out_ptr, out_at, q_ok)
        elif working == 1:
            _store(acc / total[:, None], out_ptr, out_at, q_ok)
        else:
            of_all = row * KV_HEADS + head
            part_at = (of_all * PARTS + part) * GROUP + g
            tl.store(part_max_ptr + part_at, top, mask=g < GROUP)
            tl.store(part_sum_ptr + part_at, total, mask=g < GROUP)
            tl.store(part_out_ptr + part_at[:, None] * HEAD_DIM + d[None, :], acc, mask=q_ok)
            # The counter says that all threads have stored theirs.
            tl.debug_barrier()
            before = tl.atomic_add(arrived_ptr + of_all, 1, sem="acq_rel")
            if before == working - 1:
                result = _joined(
                    part_out_ptr, part_max_ptr, part_sum_ptr, of_all * PARTS, working, g, d, q_ok,
                    GROUP, HEAD_DIM,
                )  # fmt: skip
                _store(result, out_ptr, out_at, q_ok)
                tl.store(arrived_ptr + of_all, 0)


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
    shape = (batch, kv_heads, parts, group) if parts > 1 else (1, 1, 1, 1)
    part_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    part_max = torch.empty(shape, dtype=torch.float32, device=q.device)
    part_sum = torch.empty(shape, dtype=torch.float32, device=q.device)
    arrived = arrivals(batch * kv_heads, q.device) if parts > 1 else seq_lens
    overlap = q.is_cuda and overlaps()
    launch(
        _decode_kernel, (batch, kv_heads, parts),
        q, keys, values, q if key_scales is None else key_scales, q if value_scales is None else value_scales,
        block_tables, seq_lens, out, part_out, part_max, part_sum, arrived,
        head_dim**-0.5, q.stride(0), block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, GROUP_PADDED=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim,
        DIM_PADDED=max(16, triton.next_power_of_2(head_dim)), BLOCK_SIZE=block_size, PARTS=parts, TILE=TILE,
        SCALES=0 if key_scales is None else key_scales.shape[-1], OVERLAP=overlap, num_warps=4, num_stages=3,
        **launch_options(overlap),
    )  # fmt: skip
    return out
