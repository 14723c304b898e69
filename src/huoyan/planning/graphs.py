"""Which steps are captured as CUDA graphs."""

from __future__ import annotations

from huoyan.planning.pieces import FEW_ROWS

PREFILL_GRAPH_TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768)
"""Tokens of a step of whole prompts that get a graph; beyond, the device keeps the host waiting anyway."""
PREFILL_GRAPH_PROMPTS = 8
"""Prompts of such a step at most."""


def graph_sizes(most: int) -> list[int]:
    """Batch sizes of decodes that get a graph of their own.

    Up to 64 rows kernels compute whole powers of two anyway, and the weights, read once whatever the batch, take the
    time; above, a row that is not needed costs its arithmetic. Each graph is memory that the KV cache has not.
    """
    sizes = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256]
    kept = [size for size in sizes if size < most]
    return [*kept, most] if most <= sizes[-1] else sizes


def captured_rows(most: int, int4: str | None) -> int:
    """Rows of the largest graph where `most` sequences decode at once: beyond its kernels' rows an int4 matrix is made
    dense, for which a graph would need memory of its own, and which takes longer than the launches."""
    return min(most, FEW_ROWS) if int4 == "words" else most
