"""Which decode batches are captured as CUDA graphs."""

from __future__ import annotations


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph of their own: close together where a row more costs most."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    kept = [size for size in sizes if size < most]
    return [*kept, most] if most <= sizes[-1] else sizes
