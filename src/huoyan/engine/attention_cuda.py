"""Attention over the blocks of the KV cache on CUDA: a kernel for decodes and one for prefill chunks. Rotation and the
write to the cache are one kernel before both."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class StepTensors:
    """What attention needs to know of a step of T rows, int32 on the device; decodes stand first."""

    positions: Tensor
    """[T]"""
    slot_mapping: Tensor
    """[T], -1 is nowhere."""
    decode_lens: Tensor
    """[D] tokens that the first D rows attend to, each a decode; 0 where none is."""
    tiles: Tensor
    """[tiles, 4], see `huoyan.kernels.paged_prefill.prefill_tiles`."""
    queries: int
    """The most of a tile."""
    block_tables: Tensor
    """[chunks, blocks]"""

    @staticmethod
    def of(batch: Batch, device: torch.device) -> StepTensors:
        """Those of a batch, sent in one copy."""
        queries = prefill_tile(int(batch.seq_lens.max()))
        tiles = prefill_tiles(batch.cu_seqlens_q, batch.seq_lens, batch.num_decodes, queries)
        parts: list[NDArray[np.int64]] = [
            batch.positions,
            batch.slot_mapping,
            batch.seq_lens[: batch.num_decodes],
            tiles.reshape(-1).astype(np.int64),
            batch.block_tables.reshape(-1),
        ]
        together = to_device(torch.from_numpy(np.concatenate(parts).astype(np.int32)), device)
        positions, slots, lens, flat, tables = together.split([len(part) for part in parts])
        return StepTensors(
            positions, slots, lens, flat.view(-1, 4), queries, tables.view(batch.block_tables.shape)
        )


class CudaAttention(RotatedAttention):
    """See `huoyan.models.qwen2.FusedAttend`: attention of one step, decodes first, then chunks in tiles."""

    def __init__(
        self, model: MiniCPMV, cache: KVCache, step: StepTensors, decode_parts: int | None = None
    ) -> None:
        """`decode_parts`: of a decode's context, see `paged_decode`; by default as many as its decodes want."""
        super().__init__(model, cache)
        self._step = step
        self._decode_parts = decode_parts

    def rotate_and_attend(self, layer: int, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """See `huoyan.models.qwen2.FusedAttend`; qkv is changed."""
        step = self._step
        rows = self._rotate(layer, qkv, bias, step.positions, step.slot_mapping)
        keys, values = self._cache.layer(layer)
        q = rows[:, : self._heads]
        cached = (keys.typed, values.typed, step.block_tables)
        scales = (keys.scales, values.scales)
        # Rows of neither are anything.
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decodes := len(step.decode_lens):
            first = (q[:decodes], *cached, step.decode_lens, *scales)
            paged_decode(*first, parts=self._decode_parts, out=out[:decodes])
        if len(step.tiles):
            paged_prefill(q, *cached, step.tiles, *scales, queries=step.queries, out=out)
        return out.flatten(1)
