"""Which steps are captured as CUDA graphs."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from huoyan.planning.pieces import FEW_ROWS, prefill_tile

PROMPT_GRAPH_TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768)
"""Tokens of a step that computes a few prompts alone and has a graph."""
PROMPT_GRAPH_CHUNKS = 8
"""Prompts, or pieces of them, of such a step at most."""
STEP_GRAPH_TOKENS = (128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
"""Tokens of any other step that has a graph: prompts beside decodes, many prompts. Beyond, the device keeps the host
waiting anyway."""
STEP_GRAPH_CHUNKS = 32
"""Prompts, or pieces of them, of such a step at most."""
STEP_GRAPH_PARTS = 4
"""Parts of a decode's context there: how many decode, and how long they are, is not known when it is captured."""


def graph_sizes(most: int) -> list[int]:
    """Batch sizes of decodes that get a graph of their own.

    Up to 64 rows kernels compute whole powers of two anyway, and the weights, read once whatever the batch, take the
    time; above, a row that is not needed costs its arithmetic. Each graph is memory that the KV cache has not.
    """
    sizes = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256]
    kept = [size for size in sizes if size < most]
    return [*kept, most] if most <= sizes[-1] else sizes


def captured_rows(most: int, int4: str | None) -> int:
    """Rows of the largest graph of decodes alone where `most` sequences decode at once: beyond its kernels' rows an
    int4 matrix is made dense, for which such a graph would need memory of its own."""
    return min(most, FEW_ROWS) if int4 == "words" else most


@dataclass(frozen=True)
class StepGraphSize:
    """What the graph of a step that computes prompts has room for."""

    tokens: int
    decodes: int
    chunks: int

    @property
    def queries(self) -> int:
        """Of a tile of `huoyan.kernels.paged_prefill`."""
        return prefill_tile(self.tokens)

    @property
    def tiles(self) -> int:
        """Of a chunk all but the last are full."""
        return self.tokens // self.queries + min(self.chunks, self.tokens)

    @property
    def numbers(self) -> int:
        """Integers that describe a step: positions, slots, the decodes' lengths, and four a tile."""
        return 2 * self.tokens + self.decodes + 4 * self.tiles


def step_graph_sizes(
    most_tokens: int, most_seqs: int, whole_tiles: bool = False
) -> tuple[list[StepGraphSize], list[StepGraphSize]]:
    """(those of a few prompts alone, those of anything), of steps of `most_tokens` tokens, `most_seqs` sequences.

    `whole_tiles`: tokens are multiplied in tiles of 128 (`huoyan.kernels.int4_cuts`), of which one that is not full
    takes longer. The plan, which need not know the card, counts with more.
    """
    prompts = [t for t in PROMPT_GRAPH_TOKENS if not whole_tiles or t <= 256 or t % 128 == 0]
    few, any_step = (
        sizes[: bisect_left(sizes, most_tokens) + 1] for sizes in (prompts, list(STEP_GRAPH_TOKENS))
    )
    return (
        [StepGraphSize(tokens, 0, PROMPT_GRAPH_CHUNKS) for tokens in few],
        [StepGraphSize(tokens, min(tokens, most_seqs), STEP_GRAPH_CHUNKS) for tokens in any_step],
    )


def decode_graph_inputs(rows: int, most_blocks: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of what graphs of up to `rows` decodes read, int32: (tokens, positions, slots and lengths, blocks). The
    first four are filled up to lines of memory, so that each begins where kernels read several numbers at once."""
    return (4, -(-rows // 32) * 32), (rows, most_blocks)


def step_graph_inputs(sizes: list[StepGraphSize], most_blocks: int) -> tuple[int, tuple[int, int]]:
    """Integers that such graphs read: (those that describe a step, rows and blocks of its tables)."""
    rows = max(size.decodes + size.chunks for size in sizes)
    return max(size.numbers for size in sizes), (rows, most_blocks)
