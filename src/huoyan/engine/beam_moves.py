"""Rows of a step whose beams only the device knows yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from huoyan.layers.packed_attention import to_device

if TYPE_CHECKING:
    from torch import Tensor

    from huoyan.engine.attention_cuda import StepTensors
    from huoyan.engine.batch import Batch
    from huoyan.engine.beam_ops import BeamOps
    from huoyan.engine.device_beams import BeamStep, DeviceBeams
    from huoyan.engine.kv_cache import KVCache


class BeamMoves:
    """Corrects what the host laid out: it took every beam for the one that stood there a step ago."""

    def __init__(self, ops: BeamOps, step: BeamStep, cache: KVCache, orders: Tensor) -> None:
        """`orders`: see `huoyan.layers.beam_step.move_rows`."""
        self._ops = ops
        self._step = step
        self._cache = cache
        self._orders = orders

    @staticmethod
    def of(
        batch: Batch, step: BeamStep | None, device_beams: DeviceBeams | None, cache: KVCache
    ) -> BeamMoves | None:
        """None where the batch has no such rows. `step`: the one whose tokens the host does not know yet."""
        if step is None or device_beams is None:
            return None
        orders: list[tuple[int, int, int, int]] = []
        first_row: dict[int, int] = {}
        for row, seq in enumerate(batch.in_flight):
            if seq is None or seq.group not in step.searches:
                continue
            search = step.searches[seq.group]
            # Beams have one length, so they stand together and in their order.
            first = first_row.setdefault(search, row)
            orders.append((row, search, row - first, first))
        if not orders:
            return None
        on_device = to_device(torch.from_numpy(np.array(orders, np.int64)), cache.device)
        return BeamMoves(device_beams.ops, step, cache, on_device)

    def apply(self, tokens: Tensor, positions: Tensor, slots: Tensor, tables: Tensor) -> None:
        """Change the step's rows, integers [T] and [T, blocks], where they lie, and copy what beams must part with."""
        self._ops.move(self._orders, self._step.found, self._cache, tokens, positions, slots, tables)

    def apply_to(self, step: StepTensors, tokens: Tensor) -> None:
        """The same of the rows of a step, and its token ids [T]."""
        self.apply(tokens, step.positions, step.slot_mapping, step.block_tables)
