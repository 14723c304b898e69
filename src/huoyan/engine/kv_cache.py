"""The memory behind the block pool: keys and values of every layer, in blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from huoyan.engine.kv_format import kv_format
from huoyan.errors import UnsupportedError
from huoyan.layers.kv_numbers import STORED_AS, dequantize, quantize
from huoyan.planning.pieces import COPIED_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """Keys or values of one layer (or, with one more dimension in front, of all)."""

    numbers: Tensor
    """[num_blocks, block_size, kv_heads, head_dim]; floats of 8 bits as their bytes, which torch can index."""
    scales: Tensor | None = None
    """float16 [num_blocks, block_size, kv_heads, groups] where numbers have 8 bits."""
    dtype: torch.dtype = torch.float32
    """Of the numbers, as a kernel reads them."""

    @property
    def typed(self) -> Tensor:
        """The numbers in their dtype."""
        return self.numbers.view(self.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.numbers] if self.scales is None else [self.numbers, self.scales]

    def layer(self, index: int) -> Stored:
        return Stored(self.numbers[index], None if self.scales is None else self.scales[index], self.dtype)

    def write(self, slots: Tensor, x: Tensor) -> None:
        """Store x [T, kv_heads, head_dim] of one layer at `slots`: [T]."""
        if self.scales is None:
            self.numbers.flatten(0, 1).index_copy_(0, slots, x)
            return
        numbers, scales = quantize(x, self.dtype, x.shape[-1] // self.scales.shape[-1])
        self.numbers.flatten(0, 1).index_copy_(0, slots, numbers.view(self.numbers.dtype))
        self.scales.flatten(0, 1).index_copy_(0, slots, scales)

    def rows(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """What is stored at `slots`: [T, kv_heads, head_dim] in `dtype`."""
        numbers = self.numbers.flatten(0, 1).index_select(0, slots)
        if self.scales is None:
            return numbers
        return dequantize(numbers.view(self.dtype), self.scales.flatten(0, 1).index_select(0, slots), dtype)

    def as_read(self, x: Tensor) -> Tensor:
        """What will be read of x [..., head_dim] once it is stored."""
        if self.scales is None:
            return x
        return dequantize(*quantize(x, self.dtype, x.shape[-1] // self.scales.shape[-1]), x.dtype)


class KVCache:
    """`keys` and `values`: of all layers, [num_layers, num_blocks, block_size, kv_heads, ...].

    A block of one layer is contiguous: a kernel reads it as one tile of `block_size * kv_heads` rows, and
    writing a token touches one row (of 8-bit caches, and one of their scales).
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
        kv_cache_dtype: str = "auto",
    ) -> None:
        """`kv_cache_dtype`: see `huoyan.engine.kv_format`."""
        self.format = kv_format(kv_cache_dtype, head_dim)
        if self.format.name.startswith("fp8") and device.type == "mps":
            raise UnsupportedError(f"kv_cache_dtype={kv_cache_dtype!r}: this device has no fp8; use int8")
        shape = (num_layers, num_blocks, block_size, kv_heads)
        stored = STORED_AS.get(self.format.name, dtype)
        held = torch.uint8 if self.format.name.startswith("fp8") else stored

        def make() -> Stored:
            scales = None
            if self.format.group:
                scales = _zeros((*shape, self.format.scales), torch.float16, device)
            return Stored(_zeros((*shape, head_dim), held, device), scales, stored)

        self.keys, self.values = make(), make()
        self.block_size = block_size
        self.device = device
        self._layers = [(self.keys.layer(i), self.values.layer(i)) for i in range(num_layers)]

    def of_the_same_form(self, num_layers: int, num_blocks: int) -> KVCache:
        """Another cache whose blocks are like these."""
        block_size, kv_heads, head_dim = self.keys.numbers.shape[2:]
        return KVCache(
            num_layers,
            num_blocks,
            block_size,
            kv_heads,
            head_dim,
            self.keys.dtype,
            self.device,
            self.format.name,
        )

    def layer(self, index: int) -> tuple[Stored, Stored]:
        """Keys and values of a layer."""
        return self._layers[index]

    def write(self, layer: int, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k`, `v`: [T, kv_heads, head_dim] at `slot_mapping: [T]` (block * block_size + offset)."""
        keys, values = self._layers[layer]
        keys.write(slot_mapping, k)
        values.write(slot_mapping, v)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in all layers. No destination may be a source."""
        if pairs:
            self.copy(*(torch.tensor(side, device=self.device) for side in zip(*pairs, strict=True)))

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """The same of int64 [N] each on the device. A block may be copied to itself."""
        for first in range(0, len(sources), COPIED_BLOCKS):
            part = slice(first, first + COPIED_BLOCKS)
            for tensor in (*self.keys.tensors, *self.values.tensors):
                tensor.index_copy_(1, targets[part], tensor.index_select(1, sources[part]))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not whatever was there: masked slots are multiplied by zero, and zero times NaN is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed pages, which take no memory until written; torch writes them all.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
