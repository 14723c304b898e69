"""Which steps are captured as CUDA graphs."""

from __future__ import annotations

PREFILL_GRAPH_TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768)
"""Tokens of a step of whole prompts that get a graph; beyond, the device keeps the host waiting anyway."""
PREFILL_GRAPH_PROMPTS = 8
"""Prompts of such a step at most."""


def graph_sizes(most: int) -> list[int]:
    """Batch sizes of decodes that get a graph of their own: close together where a row more costs most."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    kept = [size for size in sizes if size < most]
    return [*kept, most] if most <= sizes[-1] else sizes
