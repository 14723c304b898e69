"""Keys and values as attention over the blocks of the KV cache reads them: a tile in a kernel, a sequence in plain
PyTorch for the references."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.layers.kv_numbers import dequantize


def cached_sequence(cache: Tensor, scales: Tensor | None, blocks: Tensor, length: int) -> Tensor:
    """float32 [kv_heads, length, head_dim] of one sequence.

    Args:
        cache: keys or values of one layer, [num_blocks, block_size, kv_heads, head_dim].
        scales: of 8-bit caches, float16 [num_blocks, block_size, kv_heads, groups].
        blocks: [most blocks], those of the sequence first.
    """
    own = blocks[: -(-length // cache.shape[1])].long()
    # As bytes where the dtype is one that torch cannot index.
    rows = cache.view(torch.uint8)[own].view(cache.dtype) if scales is not None else cache[own]
    numbers = rows.float() if scales is None else dequantize(rows, scales[own], torch.float32)
    return numbers.flatten(0, 1)[:length].transpose(0, 1)


@triton.jit
def load_rows(
    numbers_ptr, scales_ptr, row, d, ok, like,
    HEAD_DIM: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Keys or values of a tile of tokens, in the dtype of `like`; with `SCALES` groups a head, out of 8 bits."""
    x = tl.load(numbers_ptr + row[:, None] * HEAD_DIM + d[None, :], mask=ok, other=0.0)
    if SCALES:
        each: tl.constexpr = HEAD_DIM // SCALES
        scale = tl.load(scales_ptr + row[:, None] * SCALES + (d // each)[None, :], mask=ok, other=0.0)
        x = (x.to(tl.float32) * scale.to(tl.float32)).to(like.dtype)
    return x
