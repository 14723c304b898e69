"""A schedule as flat arrays: what one forward over the decoder needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from huoyan.engine.schedule import Chunk, Schedule
    from huoyan.engine.sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """T tokens of S chunks. The first `num_decodes` chunks have one token each,
    the longest sequence first."""

    chunks: list[Chunk]
    num_decodes: int
    token_ids: NDArray[np.int64]
    """[T]; 0 where the token is still in flight."""
    in_flight: list[Sequence | None]
    """[num_decodes] sequences whose token the host does not know yet."""
    positions: NDArray[np.int64]
    """[T]"""
    slot_mapping: NDArray[np.int64]
    """[T] where each token's key and value go: block * block_size + offset."""
    cu_seqlens_q: NDArray[np.int64]
    """[S + 1] chunk i is tokens cu_seqlens_q[i] to cu_seqlens_q[i + 1]."""
    seq_lens: NDArray[np.int64]
    """[S] tokens that the chunk's last token attends to, itself included."""
    block_tables: NDArray[np.int64]
    """[S, most blocks] padded with block 0."""
    order: list[int]
    """[S] where the schedule's chunks, in their order, stand here."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def last_rows(self) -> NDArray[np.int64]:
        """[S] the row of each chunk's last token."""
        return self.cu_seqlens_q[1:] - 1


def build_batch(schedule: Schedule, block_size: int) -> Batch:
    """Lay a schedule's chunks out as arrays. Loops over chunks, never over tokens."""
    num_decodes = len(schedule.decodes)
    by_length = sorted(range(num_decodes), key=lambda i: -schedule.decodes[i].end)
    chunks = [schedule.decodes[i] for i in by_length] + schedule.prefills
    order = list(range(len(chunks)))
    for here, there in enumerate(by_length):
        order[there] = here

    seq_lens = np.array([chunk.end for chunk in chunks], np.int64)
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    lengths = seq_lens - starts
    cu_seqlens_q = np.zeros(len(chunks) + 1, np.int64)
    np.cumsum(lengths, out=cu_seqlens_q[1:])
    num_blocks = -(-seq_lens // block_size)
    block_tables = np.zeros((len(chunks), int(num_blocks.max())), np.int64)
    for row, chunk, count in zip(block_tables, chunks, num_blocks.tolist(), strict=True):
        row[:count] = chunk.sequence.block_table[:count]

    owner = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(cu_seqlens_q[-1]) - np.repeat(cu_seqlens_q[:-1] - starts, lengths)
    slot_mapping = block_tables[owner, positions // block_size] * block_size + positions % block_size
    decodes = chunks[:num_decodes]
    in_flight = [c.sequence if c.start >= c.sequence.num_known else None for c in decodes]
    token_ids = _token_ids(chunks, in_flight)
    return Batch(
        chunks,
        num_decodes,
        token_ids,
        in_flight,
        positions,
        slot_mapping,
        cu_seqlens_q,
        seq_lens,
        block_tables,
        order,
    )


def _token_ids(chunks: list[Chunk], in_flight: list[Sequence | None]) -> NDArray[np.int64]:
    last = np.array(
        [0 if late else _token_at(chunk) for chunk, late in zip(chunks, in_flight, strict=False)], np.int64
    )
    if len(in_flight) == len(chunks):
        return last
    rest = [chunk.sequence.token_ids(chunk.start, chunk.end) for chunk in chunks[len(in_flight) :]]
    return np.concatenate([last, *rest])


def _token_at(chunk: Chunk) -> int:
    return chunk.sequence.output_ids[chunk.start - chunk.sequence.group.prompt_len]
