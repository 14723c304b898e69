"""The batch of a step that is decodes only, from that of the step before: the blocks of a sequence are written down
once, and each step adds what is new.

What `build_batch` makes of the same schedule, which is the reference, save that the rows are sampled in the batch's own
order, so that nobody has to bring logits into another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from huoyan.engine.batch import Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from huoyan.engine.schedule import Schedule
    from huoyan.engine.sequence import Sequence

_COLUMNS = 16


class DecodeRows:
    """Keeps a row of block numbers for each sequence of the last step, for sequences that are groups by themselves."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._sequences: list[Sequence] = []
        """Those of the last step, in the schedule's order."""
        self._starts: NDArray[np.int64] = np.empty(0, np.int64)
        """[S] the token that each computed in it."""
        self._tables: NDArray[np.int64] = np.zeros((0, _COLUMNS), np.int64)
        """[S, columns] their blocks up to that token's, then 0."""

    def batch(self, schedule: Schedule) -> Batch | None:
        """The step's batch; None where it is more than single decodes, which `build_batch` is for."""
        decodes = schedule.decodes
        if schedule.prefills or not decodes:
            return None
        sequences = [chunk.sequence for chunk in decodes]
        if any(seq.group.width > 1 for seq in sequences) or any(chunk.drafts for chunk in decodes):
            return None
        starts = np.array([chunk.start for chunk in decodes], np.int64)
        size = self._block_size
        columns = starts // size
        most = int(columns.max()) + 1
        self._take_over(sequences, starts, most)
        # All before the current block are full and stay; it may be a new one.
        current = [seq.block_table[column] for seq, column in zip(sequences, columns.tolist(), strict=True)]
        self._tables[np.arange(len(sequences)), columns] = current
        order = np.argsort(-starts, kind="stable")
        positions = starts[order]
        tables = self._tables[order, :most]
        slots = np.array(current, np.int64)[order] * size + positions % size
        chunks = [decodes[i] for i in order.tolist()]
        in_flight: list[Sequence | None] = []
        token_ids = np.zeros(len(chunks), np.int64)
        for row, chunk in enumerate(chunks):
            seq = chunk.sequence
            known = chunk.start - seq.group.prompt_len
            if known >= len(seq.output_ids):
                in_flight.append(seq)
            else:
                in_flight.append(None)
                token_ids[row] = seq.output_ids[known]
        rows = np.arange(len(chunks) + 1)
        return Batch(
            chunks,
            len(chunks),
            token_ids,
            in_flight,
            positions,
            slots,
            rows,
            positions + 1,
            tables,
            chunks,
            rows[:-1],
        )

    def _take_over(self, sequences: list[Sequence], starts: NDArray[np.int64], most: int) -> None:
        """Let the rows be those of `sequences`, with the blocks before their current ones."""
        last = self._starts
        same = sequences == self._sequences
        if not same or most > self._tables.shape[1]:
            self._move(sequences, most, same)
            last = self._starts
        self._sequences, self._starts = sequences, starts
        # Who did not take the step before has other blocks, or is new.
        for row in np.flatnonzero(starts != last + 1).tolist():
            count = int(starts[row]) // self._block_size
            self._tables[row, :count] = sequences[row].block_table[:count]
            self._tables[row, count:] = 0

    def _move(self, sequences: list[Sequence], most: int, same: bool) -> None:
        """Bring the rows that are kept to their new places; new ones count as computed nowhere."""
        width = self._tables.shape[1]
        while width < most:
            width *= 2
        tables = np.zeros((len(sequences), width), np.int64)
        starts = np.full(len(sequences), -2, np.int64)
        if same:
            starts, tables[:, : self._tables.shape[1]] = self._starts, self._tables
        else:
            place = {seq: row for row, seq in enumerate(self._sequences)}
            pairs = [(new, old) for new, seq in enumerate(sequences) if (old := place.get(seq)) is not None]
            if pairs:
                new, old = np.array(pairs).T
                starts[new] = self._starts[old]
                tables[new, : self._tables.shape[1]] = self._tables[old]
        self._tables, self._starts = tables, starts
