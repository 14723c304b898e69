"""The tensor work of beam searches: plainly, on any device. `huoyan.engine.beam_ops_cuda` does the same by kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from huoyan.layers.beam_step import FACTS, advance, move_rows, room_for_found, top_candidates
from huoyan.planning.pieces import CHOICE_LOGITS

if TYPE_CHECKING:
    from torch import Tensor

    from huoyan.engine.kv_cache import KVCache
    from huoyan.layers.beam_step import SearchOrders


class BeamOps:
    """What a step needs of searches; each call is only launched."""

    def advance(
        self, logits: Tensor, orders: SearchOrders, before: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor]:
        """Choose from the logits, [rows, vocab] of any float dtype, with `count` candidates a beam.

        Returns:
            what was found (`room_for_found`) and the state after it (`huoyan.layers.beam_step.advance`).
        """
        count = min(count, logits.shape[1])
        rows = orders.rows.clamp(min=0).flatten()
        found = room_for_found(orders.searches, orders.width, count, logits.device)
        into = found.view(-1, found.shape[2])[:, FACTS:]
        # As many rows at once as the plan has memory for.
        step = max(CHOICE_LOGITS // logits.shape[1], 1)
        for first in range(0, len(rows), step):
            values, ids = top_candidates(logits[rows[first : first + step]].float(), count)
            into[first : first + step, :count] = ids
            into[first : first + step, count:] = values.contiguous().view(torch.int32)
        return found, advance(orders, found, before)

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
        """Rows of the beams that live on, and their current blocks: see `huoyan.layers.beam_step.move_rows`."""
        sources, targets = move_rows(orders, found, cache.block_size, tokens, positions, slots, tables)
        cache.copy(sources, targets)
