"""What the graphs of decode steps read of a step: written down on the host, and brought to where the device looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from huoyan.engine.attention_cuda import StepTensors
from huoyan.planning.graphs import decode_graph_inputs

if TYPE_CHECKING:
    from huoyan.engine.batch import Batch
    from huoyan.engine.beam_moves import BeamMoves
    from huoyan.engine.runner import Late

TOKEN, POSITION, SLOT, LENGTH = range(4)
"""Rows of the numbers."""


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
        counts = [numbers[0] * numbers[1], tables[0] * tables[1]]
        pin = device.type == "cuda"
        self._flat = torch.zeros(sum(counts), dtype=torch.int32, device=device)
        self._host = torch.zeros(sum(counts), dtype=torch.int32, pin_memory=pin)
        first, rest = self._flat.split(counts)
        self._numbers, self._tables = first.view(numbers), rest.view(tables)
        first, rest = self._host.split(counts)
        self._written, self._rows = first.view(numbers).numpy(), rest.view(tables).numpy()
        self._no_tiles = torch.zeros((0, 4), dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if pin else None

    def tensors(self, size: int) -> DecodeTensors:
        """Those of a graph of `size` rows."""
        tokens, positions, slots, lengths = self._numbers[:, :size].unbind(0)
        tables = self._tables[:size]
        return DecodeTensors(tokens, StepTensors(positions, slots, lengths, self._no_tiles, 0, tables))

    def clear(self, size: int) -> None:
        """On the device: a step of nothing, which leaves the cache alone."""
        self._numbers[SLOT, :size], self._numbers[LENGTH, :size] = -1, 1

    def fill(self, size: int, batch: Batch, late: Late | None, moves: BeamMoves | None) -> None:
        """Let the first `size` rows be a step's; those beyond its own write nowhere and read one token.

        `late`: tokens that only the device knows; `moves`: beams that only it knows.
        """
        if self._copied is not None:
            # The last copy must have read the host's numbers before they change.
            self._copied.synchronize()
        count, blocks = batch.block_tables.shape
        numbers = self._written
        numbers[TOKEN, :count], numbers[POSITION, :count] = batch.token_ids, batch.positions
        numbers[SLOT, :count], numbers[LENGTH, :count] = batch.slot_mapping, batch.seq_lens
        numbers[SLOT, count:size], numbers[LENGTH, count:size] = -1, 1
        self._rows[:count, :blocks] = batch.block_tables
        self._flat.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        found = self.tensors(size)
        if late is not None:
            which, ids = late
            if which is None:
                found.tokens[: len(ids)].copy_(ids)
            else:
                found.tokens.index_copy_(0, which, ids.to(torch.int32))
        if moves is not None:
            moves.apply_to(found.step, found.tokens)
