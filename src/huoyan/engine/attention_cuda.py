"""Attention over the blocks of the KV cache on CUDA: a kernel for decodes and one for prefill chunks. Rotation and the
write to the cache are one kernel before both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from huoyan.engine.rotated_attention import RotatedAttention
from huoyan.kernels.paged_decode import paged_decode
from huoyan.kernels.paged_prefill import paged_prefill, prefill_tiles
from huoyan.layers.packed_attention import to_device
from huoyan.planning.pieces import prefill_tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from huoyan.engine.batch import Batch
    from huoyan.engine.kv_cache import KVCache
    from huoyan.models.minicpmv import MiniCPMV


class StepTensors:
    """The int32 arrays of one step, sent to the device in one copy."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.queries = prefill_tile(int(batch.seq_lens.max()))
        tiles = prefill_tiles(batch.cu_seqlens_q, batch.seq_lens, batch.num_decodes, self.queries)
        parts: list[NDArray[np.int64]] = [
            batch.positions,
            batch.slot_mapping,
            batch.seq_lens,
            tiles.reshape(-1).astype(np.int64),
            batch.block_tables.reshape(-1),
        ]
        together = to_device(torch.from_numpy(np.concatenate(parts).astype(np.int32)), device)
        pieces = together.split([len(part) for part in parts])
        self.positions, self.slot_mapping, self.seq_lens = pieces[:3]
        self.tiles = pieces[3].view(-1, 4)
        self.block_tables = pieces[4].view(batch.block_tables.shape)


class CudaAttention(RotatedAttention):
    """See `huoyan.models.qwen2.FusedAttend`: attention of one step's batch, decodes first."""

    def __init__(self, model: MiniCPMV, cache: KVCache, batch: Batch, tensors: StepTensors) -> None:
        super().__init__(model, cache)
        self._tensors = tensors
        self._decodes = batch.num_decodes

    def rotate_and_attend(self, layer: int, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """See `huoyan.models.qwen2.FusedAttend`; qkv is changed."""
        step = self._tensors
        rows = self._rotate(layer, qkv, bias, step.positions, step.slot_mapping)
        keys, values = self._cache.layer(layer)
        q = rows[:, : self._heads]
        cached = (keys.typed, values.typed, step.block_tables)
        scales = (keys.scales, values.scales)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        decodes = self._decodes
        if decodes:
            lengths = step.seq_lens[:decodes]
            paged_decode(q[:decodes], *cached, lengths, *scales, out=out[:decodes])
        if len(step.tiles):
            paged_prefill(q, *cached, step.tiles, *scales, queries=step.queries, out=out)
        return out.flatten(1)
