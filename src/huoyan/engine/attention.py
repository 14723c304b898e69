"""Attention over the blocks of the KV cache, in plain PyTorch: the CPU's path, and right on any device.

A plan is made once a step and used by every layer: `attend = paged_attention(cache, batch)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from huoyan.layers.kv_numbers import scale_
from huoyan.planning.pieces import GATHER_TOKENS, MASK_VALUES

if TYPE_CHECKING:
    from torch import Tensor

    from huoyan.engine.batch import Batch
    from huoyan.engine.kv_cache import KVCache, Stored

QUERY_PIECE = 512
"""Queries of a later chunk that are attended at once, at most."""


@dataclass(frozen=True)
class _DecodeBucket:
    """Decode rows [start, end) of about equal lengths, padded to the longest."""

    start: int
    end: int
    max_len: int
    blocks: Tensor
    """[(end - start) * blocks of the longest]"""
    mask: Tensor | None
    """[end - start, 1, 1, max_len] added to the scores; None where all lengths are equal."""


@dataclass(frozen=True)
class _PrefillChunk:
    """Rows [start, end) of one sequence, which has `context` tokens before them in the cache."""

    start: int
    end: int
    context: int
    blocks: Tensor


class Workspace:
    """Memory for gathered keys and values, kept from layer to layer and step to step.

    New memory for every gather would cost more than the gather: its pages are touched for the first time.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def gather(
        self, which: str, stored: Stored, blocks: Tensor, rows: int, length: int, dtype: torch.dtype
    ) -> Tensor:
        """[rows, kv_heads, length, head_dim] of the given blocks ([rows * blocks a row]).

        The result is overwritten by the next call of the same `which`.
        """
        numbers = stored.numbers
        if stored.scales is None:
            picked = self._select(which, numbers, blocks)
        else:
            bits = self._select("bits", numbers, blocks).view(stored.dtype)
            scales = self._select("scales", stored.scales, blocks)
            picked = scale_(self._room(which, numbers, len(blocks), dtype).copy_(bits), scales)
        return picked.view(rows, -1, *numbers.shape[2:])[:, :length].transpose(1, 2)

    def _select(self, which: str, source: Tensor, blocks: Tensor) -> Tensor:
        room = self._room(which, source, len(blocks), source.dtype)
        return torch.index_select(source, 0, blocks, out=room)

    def _room(self, which: str, like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        buffer = self._buffers.get(which)
        if buffer is None or buffer.shape[0] < count:
            size = self._rounded_up(count, like.shape[1])
            buffer = like.new_empty((size, *like.shape[1:]), dtype=dtype)
            self._buffers[which] = buffer
        return buffer[:count]

    @staticmethod
    def _rounded_up(count: int, block_size: int) -> int:
        """The next power of two, so that a growing context does not grow the buffer every few steps."""
        return max(count, min(1 << max(count - 1, 0).bit_length(), GATHER_TOKENS // block_size))


class PagedAttention:
    """Attention of one step's batch. The step's keys and values are written first: rows may read them.

    A row always sees keys and values as the cache has them, also those of its own step: with 8 bits an answer would
    else depend on where its prompt was cut into chunks.
    """

    def __init__(self, cache: KVCache, batch: Batch, dtype: torch.dtype, workspace: Workspace) -> None:
        device = cache.device
        self._workspace = workspace
        self._cache = cache
        self._slots = torch.from_numpy(batch.slot_mapping).to(device)
        tables = torch.from_numpy(batch.block_tables).to(device)
        self._decodes = _buckets(batch, tables, cache.block_size, dtype)
        self._prefills = []
        for i in range(batch.num_decodes, len(batch.seq_lens)):
            start, end = int(batch.cu_seqlens_q[i]), int(batch.cu_seqlens_q[i + 1])
            seq_len = int(batch.seq_lens[i])
            blocks = tables[i, : -(-seq_len // cache.block_size)]
            self._prefills.append(_PrefillChunk(start, end, seq_len - (end - start), blocks))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `huoyan.models.qwen2.Attend`."""
        self._cache.write(layer, self._slots, k, v)
        keys, values = self._cache.layer(layer)
        parts = [self._decode(bucket, q, keys, values) for bucket in self._decodes]
        if any(chunk.context == 0 for chunk in self._prefills):
            k, v = keys.as_read(k), values.as_read(v)
        for chunk in self._prefills:
            parts.extend(self._prefill(chunk, q, k, v, keys, values))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, bucket: _DecodeBucket, q: Tensor, keys: Stored, values: Stored) -> Tensor:
        rows = bucket.end - bucket.start
        heads, head_dim = q.shape[1:]
        kv_heads = keys.numbers.shape[2]
        k = self._workspace.gather("keys", keys, bucket.blocks, rows, bucket.max_len, q.dtype)
        v = self._workspace.gather("values", values, bucket.blocks, rows, bucket.max_len, q.dtype)
        # The query heads that share a key head stand where queries of several positions would.
        grouped = q[bucket.start : bucket.end].reshape(rows, kv_heads, heads // kv_heads, head_dim)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=bucket.mask)
        return out.reshape(rows, heads, head_dim)

    def _prefill(
        self, chunk: _PrefillChunk, q: Tensor, k: Tensor, v: Tensor, keys: Stored, values: Stored
    ) -> list[Tensor]:
        queries = q[chunk.start : chunk.end].transpose(0, 1)[None]
        if chunk.context == 0:
            own_k = k[chunk.start : chunk.end].transpose(0, 1)[None]
            own_v = v[chunk.start : chunk.end].transpose(0, 1)[None]
            out = F.scaled_dot_product_attention(queries, own_k, own_v, is_causal=True, enable_gqa=True)
            return [out[0].transpose(0, 1)]
        length = chunk.end - chunk.start
        all_k = self._workspace.gather("keys", keys, chunk.blocks, 1, chunk.context + length, q.dtype)
        all_v = self._workspace.gather("values", values, chunk.blocks, 1, chunk.context + length, q.dtype)
        group = q.shape[1] // keys.numbers.shape[2]
        folded = q.is_cuda and group > 1
        piece = MASK_VALUES // (chunk.context + length) // (group if folded else 1)
        piece = max(min(piece, QUERY_PIECE), 1)
        parts = []
        for first in range(0, length, piece):
            last = min(first + piece, length)
            seen = chunk.context + last
            mask = torch.ones(last - first, seen, dtype=torch.bool, device=q.device)
            mask = mask.tril_(chunk.context + first)
            attend = attend_folded if folded else _attend_grouped
            out = attend(queries[:, :, first:last], all_k[:, :, :seen], all_v[:, :, :seen], mask)
            parts.append(out[0].transpose(0, 1))
        return parts


def _attend_grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def attend_folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of q [1, heads, Q, head_dim] over k, v [1, kv_heads, S, head_dim] under mask bool [Q, S].

    The query heads that share a key head stand as further queries. On CUDA grouped heads with a mask would fall
    to an implementation that writes all scores out in float32: gigabytes at a long context.
    """
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    rows = q.unflatten(1, (kv_heads, group)).flatten(2, 3)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.repeat(group, 1))
    apart: Tensor = out.unflatten(2, (group, -1))
    return apart.flatten(1, 2)


def _buckets(batch: Batch, tables: Tensor, block_size: int, dtype: torch.dtype) -> list[_DecodeBucket]:
    """Cut the decode rows, which are sorted by length, where padding would exceed half of the work."""
    lengths = batch.seq_lens[: batch.num_decodes].tolist()
    buckets = []
    start = 0
    while start < len(lengths):
        max_len = lengths[start]
        # Below four blocks another call costs more than the padding.
        shortest = max_len // 2 if max_len > 4 * block_size else 0
        most = start + max(GATHER_TOKENS // (-(-max_len // block_size) * block_size), 1)
        end = start + 1
        while end < min(len(lengths), most) and lengths[end] >= shortest:
            end += 1
        blocks = tables[start:end, : -(-max_len // block_size)].reshape(-1)
        mask = None
        if lengths[end - 1] != max_len:
            own = torch.tensor(lengths[start:end], device=tables.device)
            beyond = torch.arange(max_len, device=tables.device) >= own[:, None]
            mask = torch.zeros(beyond.shape, dtype=dtype, device=tables.device)
            mask.masked_fill_(beyond, float("-inf"))
            mask = mask[:, None, None, :]
        buckets.append(_DecodeBucket(start, end, max_len, blocks, mask))
        start = end
    return buckets
