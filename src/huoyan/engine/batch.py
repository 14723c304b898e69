"""A schedule as flat arrays: what one forward over the decoder needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from huoyan.engine.schedule import Chunk

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from huoyan.engine.schedule import Schedule
    from huoyan.engine.sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """T tokens of S chunks. The first `num_decodes` chunks have one token each,
    the longest sequence first. A decode with guesses is several of them, or a longer chunk behind them."""

    chunks: list[Chunk]
    num_decodes: int
    token_ids: NDArray[np.int64]
    """[T]; 0 where the token is still in flight. Of beams in flight slots and blocks are those of a step ago."""
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
    sampling: list[Chunk]
    """The schedule's chunks that sample, in their order."""
    sampled_rows: NDArray[np.int64]
    """Rows whose logits are wanted: of each of `sampling` the last one, and those before its drafts."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def build_batch(schedule: Schedule, block_size: int, draft_rows: bool = False) -> Batch:
    """Lay a schedule's chunks out as arrays. Loops over chunks and guesses, never over a prompt's tokens.

    `draft_rows`: each guess is a decode of its own, which finds the keys of those before it in the cache as it finds
    all others: for kernels that read a sequence's blocks once a row, and for graphs. Else a decode and its guesses
    are one chunk of several tokens.
    """
    singles: list[Chunk] = []
    longer: list[Chunk] = []
    for chunk in schedule.decodes:
        if not chunk.drafts:
            singles.append(chunk)
        elif draft_rows:
            singles.extend(_apart(chunk))
        else:
            longer.append(chunk)
    singles.sort(key=lambda chunk: -chunk.end)
    num_decodes = len(singles)
    chunks = singles + longer + schedule.prefills

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
    in_flight = [c.sequence if _is_late(c) else None for c in decodes]
    token_ids = _token_ids(chunks, in_flight)
    last_row = {
        (id(chunk.sequence), chunk.end): row
        for chunk, row in zip(chunks, (cu_seqlens_q[1:] - 1).tolist(), strict=True)
    }
    sampling = [chunk for chunk in schedule.chunks if chunk.samples]
    rows: list[int] = []
    for chunk in sampling:
        count = len(chunk.drafts)
        if draft_rows:
            rows.extend(last_row[id(chunk.sequence), chunk.end - i] for i in range(count, -1, -1))
        else:
            last = last_row[id(chunk.sequence), chunk.end]
            rows.extend(range(last - count, last + 1))
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
        sampling,
        np.array(rows, np.int64),
    )


def _apart(chunk: Chunk) -> list[Chunk]:
    """A decode and its guesses, one token each."""
    return [
        Chunk(chunk.sequence, chunk.start + i, chunk.start + i + 1, True, chunk.drafts[:i])
        for i in range(chunk.num_tokens)
    ]


def _is_late(chunk: Chunk) -> bool:
    """Whether the token of a decode is still in flight."""
    return not chunk.drafts and chunk.start >= chunk.sequence.num_known


def _token_ids(chunks: list[Chunk], in_flight: list[Sequence | None]) -> NDArray[np.int64]:
    last = np.array(
        [0 if late else _token_at(chunk) for chunk, late in zip(chunks, in_flight, strict=False)], np.int64
    )
    if len(in_flight) == len(chunks):
        return last
    rest: list[NDArray[np.int64]] = []
    for chunk in chunks[len(in_flight) :]:
        rest.append(chunk.sequence.token_ids(chunk.start, chunk.end - len(chunk.drafts)))
        if chunk.drafts:
            rest.append(np.array(chunk.drafts, np.int64))
    return np.concatenate([last, *rest])


def _token_at(chunk: Chunk) -> int:
    if chunk.drafts:
        return chunk.drafts[-1]
    return chunk.sequence.output_ids[chunk.start - chunk.sequence.group.prompt_len]
