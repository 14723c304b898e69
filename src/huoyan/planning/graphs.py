"""Which decode batches are captured as CUDA graphs."""

from __future__ import annotations


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph of their own.

    Up to 64 rows kernels compute whole powers of two anyway, and the weights, read once whatever the batch, take the
    time; above, a row that is not needed costs its arithmetic. Each graph is memory that the KV cache has not.
    """
    sizes = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256]
    kept = [size for size in sizes if size < most]
    return [*kept, most] if most <= sizes[-1] else sizes
