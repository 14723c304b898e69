"""The layout of int4 matrices that our kernels read.

The matrix is the left operand, outputs by inputs, because that one the matrix units take from registers: nothing of
it is written anywhere after it was read. Its layout is made for that. Inputs are taken in runs of 32, which are four
words; word c of a run holds, in its nibble h * 2 + e + 4 * b (from the lowest), input 16 h + 8 e + 2 c + b of the run.
These are the inputs that one thread multiplies, and the two of a pair (b) stand where two 16-bit numbers stand: a
shift, a mask and a subtraction unpack both at once. `words` int32 [N / 64, K / 128, 64, 16]: what a program reads at a
time are 64 outputs of 128 inputs, 4 KiB end to end (rows of 64 bytes, far apart, were read half as fast).

`meta` int32 [K / group_size, N] holds a group's scale in the lower and its zero point in the upper 16 bits, both as
numbers of the dtype, the zero point on top of the same constant that nibbles are built on.

A gate and what it gates, two matrices of as many outputs, are one whose outputs are `paired`: 32 of the gate, then the
same 32 of the other, and so on. So a program has both of a pair, and writes their product.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Inputs that are multiplied at a time; their number must be a multiple of it."""
TILE = 64
"""Outputs that stand together."""
PAIR = TILE // 2
"""Outputs of a gate that stand together where they are paired; their number must be a multiple of it."""
_BUILT_ON = {torch.float16: 1024.0, torch.bfloat16: 128.0}
"""A nibble in the lowest bits of this number's mantissa is the number plus the nibble."""


def paired(rows: Tensor) -> Tensor:
    """[2 W, …], those of a gate and then those it gates, in the order above."""
    ordered: Tensor = rows.unflatten(0, (2, -1, PAIR)).transpose(0, 1).flatten(0, 2)
    return ordered


def unpaired(rows: Tensor) -> Tensor:
    """The inverse of `paired`."""
    ordered: Tensor = rows.unflatten(0, (-1, 2, PAIR)).transpose(0, 1).flatten(0, 2)
    return ordered


def pack_words(q: Tensor) -> Tensor:
    """uint8 [N, K] of values 0 to 15, K a multiple of 128 -> int32 [N / 64, K / 128, 64, 16] in the layout above.

    N is rounded up to a multiple of 64, with zeros.
    """
    rows = -(-q.shape[0] // TILE) * TILE
    words = torch.zeros(rows, q.shape[1] // 8, dtype=torch.int32, device=q.device)
    runs = q.unflatten(1, (-1, 2, 2, 4, 2))  # N, run, h, e, c, b
    filled = words[: q.shape[0]].unflatten(1, (-1, 4))
    for h in range(2):
        for e in range(2):
            for b in range(2):
                filled |= runs[:, :, h, e, :, b].to(torch.int32) << 4 * (2 * h + e + 4 * b)
    tiles: Tensor = words.unflatten(1, (-1, 16)).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()
    return tiles


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of `pack_words`: uint8 [N, K], the rows that fill the last tile included."""
    runs = words.transpose(1, 2).flatten(2).flatten(0, 1).unflatten(1, (-1, 4))
    out = torch.empty(*runs.shape[:2], 2, 2, 4, 2, dtype=torch.uint8, device=words.device)
    for h in range(2):
        for e in range(2):
            for b in range(2):
                out[:, :, h, e, :, b] = ((runs >> 4 * (2 * h + e + 4 * b)) & 15).to(torch.uint8)
    return out.flatten(1)


def pack_meta(scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales and zero points (whole numbers, 0 to 16) [N, K / group_size] -> int32 [K / group_size, N]."""
    low = scales.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
    high = (zeros.float() + _BUILT_ON[dtype]).to(dtype).view(torch.int16).to(torch.int32) << 16
    return (low | high).T.contiguous()


def unpack_meta(meta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_meta`: scales and zero points of `dtype`, [N, K / group_size]."""
    low, high = ((meta >> shift).to(torch.int16).view(dtype).T.contiguous() for shift in (0, 16))
    return low, high - _BUILT_ON[dtype]


def dequantize_reference(words: Tensor, meta: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [N, K]; `dtype`: of the numbers in `meta`."""
    scales, zeros = (part.float().unsqueeze(-1) for part in unpack_meta(meta, dtype))
    q = unpack_words(words)[: meta.shape[1]].unflatten(1, (meta.shape[0], -1)).float()
    weight: Tensor = (q - zeros) * scales
    return weight.flatten(1)
