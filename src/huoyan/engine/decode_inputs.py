"""What the graphs of decode steps read of a step: written down on the host, and brought to where the device looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from huoyan.engine.attention_cuda import StepTensors
from huoyan.engine.pinned import PinnedIntegers
from huoyan.kernels.fill_inputs import LENGTH, POSITION, SLOT, SOURCE, TOKEN, fill_inputs
from huoyan.planning.graphs import decode_graph_inputs

if TYPE_CHECKING:
    from huoyan.engine.batch import Batch
    from huoyan.engine.beam_moves import BeamMoves
    from huoyan.engine.in_flight import Late


@dataclass(frozen=True)
class DecodeTensors:
    """Where a graph of T rows reads them, int32 on the device."""

    tokens: Tensor
    """[T]"""
    step: StepTensors
    """No tiles: every row is a decode."""


class DecodeInputs:
    """One for all sizes of graphs. An array for each kind of number, so that kernels take them as they are."""

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        """`rows`: of the largest graph, `blocks`: of the longest sequence."""
        numbers, tables = decode_graph_inputs(rows, blocks)
        self._numbers, self._tables = (
            torch.zeros(shape, dtype=torch.int32, device=device) for shape in (numbers, tables)
        )
        self._no_ids = torch.zeros(1, dtype=torch.int64, device=device)
        self._no_tiles = torch.zeros((0, 4), dtype=torch.int32, device=device)
        # The step before may still be waited for when the next one is written down.
        self._turns = [PinnedIntegers(((SOURCE + 1, numbers[1]), tables), device) for _ in range(2)]

    def tensors(self, size: int) -> DecodeTensors:
        """Those of a graph of `size` rows."""
        tokens, positions, slots, lengths = self._numbers[:, :size].unbind(0)
        tables = self._tables[:size]
        return DecodeTensors(tokens, StepTensors(positions, slots, lengths, self._no_tiles, 0, tables))

    def clear(self, size: int) -> None:
        """Let the first `size` rows be a step of nothing, which leaves the cache alone."""
        self._send(self._turns[0], self._no_ids, size, 0, 0)

    def fill(self, size: int, batch: Batch, late: Late | None, moves: BeamMoves | None) -> None:
        """Let the first `size` rows be a step's; those beyond its own write nowhere and read one token. Say `launched`
        when what reads them is.

        `late`: tokens that only the device knows; `moves`: beams that only it knows.
        """
        self._turns.reverse()
        written = self._turns[0]
        written.wait()
        count, blocks = batch.block_tables.shape
        numbers, tables = written.arrays
        numbers[TOKEN, :count], numbers[POSITION, :count] = batch.token_ids, batch.positions
        numbers[SLOT, :count], numbers[LENGTH, :count] = batch.slot_mapping, batch.seq_lens
        numbers[SOURCE, :count] = -1
        ids = self._no_ids
        if late is not None:
            ids = late.ids
            places = np.arange(len(ids)) if late.places is None else late.places
            numbers[SOURCE, slice(len(places)) if late.rows is None else late.rows] = places
        tables[:count, :blocks] = batch.block_tables
        self._send(written, ids, size, count, blocks)
        if moves is not None:
            # What lies beyond the step's own need not be looked at.
            tokens, positions, slots, _ = self._numbers[:, :count].unbind(0)
            moves.apply(tokens, positions, slots, self._tables[:count, :blocks])

    def launched(self) -> None:
        """All that reads what was filled in last is on its way: nothing stands between it and the filling."""
        self._turns[0].mark()

    def _send(self, written: PinnedIntegers, ids: Tensor, size: int, count: int, blocks: int) -> None:
        numbers, tables = written.tensors
        fill_inputs(numbers, tables, ids, self._numbers, self._tables, size, count, blocks)
