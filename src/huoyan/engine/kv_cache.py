"""The memory behind the block pool: keys and values of every layer, in blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from huoyan.planning.pieces import COPIED_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class KVCache:
    """`keys` and `values`: [num_layers, num_blocks, block_size, kv_heads, head_dim].

    A block of one layer is contiguous: a kernel reads it as one tile of `block_size * kv_heads` rows, and
    writing a token touches one row.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_blocks, block_size, kv_heads, head_dim)
        self.keys = _zeros(shape, dtype, device)
        self.values = _zeros(shape, dtype, device)
        self.block_size = block_size
        self._layers = [(self.keys[i], self.values[i]) for i in range(num_layers)]
        self._rows = [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in self._layers]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [num_blocks, block_size, kv_heads, head_dim]."""
        return self._layers[index]

    def write(self, layer: int, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k`, `v`: [T, kv_heads, head_dim] at `slot_mapping: [T]` (block * block_size + offset)."""
        keys, values = self._rows[layer]
        keys.index_copy_(0, slot_mapping, k)
        values.index_copy_(0, slot_mapping, v)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in all layers. No destination may be a source."""
        if not pairs:
            return
        for first in range(0, len(pairs), COPIED_BLOCKS):
            part = zip(*pairs[first : first + COPIED_BLOCKS], strict=True)
            sources, targets = (torch.tensor(side, device=self.keys.device) for side in part)
            for cache in (self.keys, self.values):
                cache.index_copy_(1, targets, cache.index_select(1, sources))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not whatever was there: masked slots are multiplied by zero, and zero times NaN is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed pages, which take no memory until written; torch writes them all.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
