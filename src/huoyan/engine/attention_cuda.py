"""Attention over the blocks of the KV cache on CUDA: our kernel for decodes, torch's packed flash attention for
prefill chunks. Rotation and the write to the cache are one kernel before both."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from huoyan.engine.rotated_attention import RotatedAttention
from huoyan.kernels.paged_decode import paged_decode
from huoyan.layers.packed_attention import to_device
from huoyan.layers.varlen_attention import varlen_attention
from huoyan.planning.pieces import GATHER_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from huoyan.engine.batch import Batch
    from huoyan.engine.kv_cache import KVCache, Stored
    from huoyan.models.minicpmv import MiniCPMV


class StepTensors:
    """The int32 arrays of one step, sent to the device in one copy."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        parts: list[NDArray[np.int64]] = [
            batch.positions,
            batch.slot_mapping,
            batch.seq_lens,
            batch.block_tables.reshape(-1),
        ]
        together = to_device(torch.from_numpy(np.concatenate(parts).astype(np.int32)), device)
        pieces = together.split([len(part) for part in parts])
        self.positions, self.slot_mapping, self.seq_lens = pieces[:3]
        self.block_tables = pieces[3].view(batch.block_tables.shape)


class CudaAttention(RotatedAttention):
    """See `huoyan.models.qwen2.FusedAttend`: attention of one step's batch, decodes first."""

    def __init__(self, model: MiniCPMV, cache: KVCache, batch: Batch, tensors: StepTensors) -> None:
        super().__init__(model, cache)
        self._tensors = tensors
        self._decodes = batch.num_decodes
        self._prefills = [
            _PrefillPlan(cache, batch, first, last)
            for first, last in prefill_groups(batch, batch.num_decodes)
        ]

    def rotate_and_attend(self, layer: int, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """See `huoyan.models.qwen2.FusedAttend`; qkv is changed."""
        rows = self._rotate(layer, qkv, bias, self._tensors.positions, self._tensors.slot_mapping)
        keys, values = self._cache.layer(layer)
        decodes = self._decodes
        parts = []
        if decodes:
            parts.append(
                paged_decode(
                    rows[:decodes, : self._heads],
                    keys.typed,
                    values.typed,
                    self._tensors.block_tables[:decodes],
                    self._tensors.seq_lens[:decodes],
                    keys.scales,
                    values.scales,
                ).flatten(1)
            )
        for plan in self._prefills:
            parts.append(plan.attend(rows, self._heads, keys, values).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def prefill_groups(batch: Batch, first: int) -> list[tuple[int, int]]:
    """Chunks from `first` on in runs (first, last) that attend to GATHER_TOKENS tokens at most, or are one."""
    groups: list[tuple[int, int]] = []
    room = 0
    for i in range(first, len(batch.chunks)):
        length = int(batch.seq_lens[i])
        if length > room:
            groups.append((i, i))
            room = GATHER_TOKENS
        groups[-1] = (groups[-1][0], i + 1)
        room -= length
    return groups


class _PrefillPlan:
    """Prefill chunks first to last as one packed call; chunks with a past read it from the cache.

    Where the cache has 8 bits all of them do: see `PagedAttention`.
    """

    def __init__(self, cache: KVCache, batch: Batch, first: int, last: int) -> None:
        self.first, self.last = int(batch.cu_seqlens_q[first]), int(batch.cu_seqlens_q[last])
        starts = batch.cu_seqlens_q[first : last + 1] - self.first
        q_lengths = np.diff(starts)
        k_lengths = batch.seq_lens[first:last]
        self.max_q, self.max_k = int(q_lengths.max()), int(k_lengths.max())
        device = cache.device
        cu = torch.tensor([starts.tolist(), [0, *accumulate(k_lengths.tolist())]], dtype=torch.int32)
        self.cu_q, self.cu_k = to_device(cu, device).unbind(0)
        self.slots: Tensor | None = None
        if cache.format.group or (k_lengths != q_lengths).any():
            size = cache.block_size
            slots = [
                (table[:, None] * size + np.arange(size)).reshape(-1)[:length]
                for table, length in zip(batch.block_tables[first:last], k_lengths.tolist(), strict=True)
            ]
            self.slots = to_device(torch.from_numpy(np.concatenate(slots)), device)

    def attend(self, rows: Tensor, heads: int, keys: Stored, values: Stored) -> Tensor:
        """rows [T, heads + 2 kv_heads, head_dim] of the step, rotated -> [chunks' tokens, heads, head_dim]."""
        rows = rows[self.first : self.last]
        kv_heads = keys.numbers.shape[2]
        if self.slots is None:
            k, v = rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]
        else:
            k, v = (stored.rows(self.slots, rows.dtype) for stored in (keys, values))
        return varlen_attention(
            rows[:, :heads], k, v, self.cu_q, self.cu_k, self.max_q, self.max_k, causal=True
        )
