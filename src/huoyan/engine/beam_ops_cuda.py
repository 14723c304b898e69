"""The tensor work of beam searches on CUDA: five small kernels a step in place of some sixty."""

from __future__ import annotations

from typing import TYPE_CHECKING

from huoyan.engine.beam_ops import BeamOps
from huoyan.kernels.beam_advance import beam_advance, fits
from huoyan.kernels.beam_candidates import beam_candidates
from huoyan.kernels.beam_move import beam_move
from huoyan.kernels.copy_blocks import copy_blocks
from huoyan.layers.beam_step import FACTS, room_for_found

if TYPE_CHECKING:
    from torch import Tensor

    from huoyan.engine.kv_cache import KVCache
    from huoyan.layers.beam_step import SearchOrders


class KernelBeamOps(BeamOps):
    """See `BeamOps`."""

    def advance(
        self, logits: Tensor, orders: SearchOrders, before: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor]:
        count = min(count, logits.shape[1])
        if not fits(orders.width, count):
            return super().advance(logits, orders, before, count)
        found = room_for_found(orders.searches, orders.width, count, logits.device)
        beam_candidates(logits, orders.rows, found, FACTS)
        return found, beam_advance(orders, found, before)

    def move(
        self,
        orders: Tensor,
        found: Tensor,
        cache: KVCache,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        tables: Tensor,
    ) -> None:
        sources, targets = beam_move(orders, found, cache.block_size, tokens, positions, slots, tables)
        for tensor in (*cache.keys.tensors, *cache.values.tensors):
            copy_blocks(tensor, sources, targets)
