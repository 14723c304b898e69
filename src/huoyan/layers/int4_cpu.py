"""An int4 matrix on a CPU in bfloat16: torch's packed product for a few rows, dense blocks of outputs for many.

torch's product takes as long for a row whatever their number. A matrix product of dense weights takes less than half of
that, and unpacking as long as some hundred rows: so a prompt goes through dense blocks, one at a time.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from huoyan.layers.blocks import linear_by_blocks
from huoyan.layers.cpu import multiplies_bfloat16
from huoyan.planning.pieces import FEW_ROWS_CPU, unpacked_rows

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = (32, 64, 128, 256)
"""Inputs that may share a scale."""
_BLOCK = 64
"""Outputs that torch packs together where it has 512-bit vectors."""


def multiply(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] @ weight.T + bias [out], all bfloat16.

    Args:
        packed: uint8 [out, in / 2], of `pack`.
        scales: [groups, out, 2], what a value less 8 is multiplied by and what is added then.
    """
    width_out, width_in = len(packed), x.shape[1]
    if len(x) > FEW_ROWS_CPU and width_out % _BLOCK == 0 and unpacking_pays():
        rows = unpacked_rows(width_out, width_in)
        return linear_by_blocks(x, width_out, lambda *part: unpack(packed, scales, *part), bias, rows)
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, width_in // len(scales), scales)
    return out if bias is None else out + bias


def pack(q: Tensor) -> Tensor:
    """uint8 [out, in / 2] of values 0 to 15, [out, in] with `out` a multiple of 16 and `in` of 32."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    return packed


def unpack(packed: Tensor, scales: Tensor, start: int, stop: int) -> Tensor:
    """Rows start to stop of the weight, multiples of 64: bfloat16 [stop - start, in]. See `unpacking_pays`."""
    width = 2 * packed.shape[1]
    part = slice(start // _BLOCK, stop // _BLOCK)
    nibbles = _nibbles(packed.view(-1, width, _BLOCK // 2)[part])
    weight = nibbles.view(torch.int8).sub_(8).to(torch.bfloat16)
    del nibbles
    # Of each kind together in memory: where they alternate, the product takes three times as long.
    factors, offsets = (
        scales.unflatten(1, (-1, _BLOCK))[:, part].permute(3, 1, 0, 2).contiguous().unsqueeze(3)
    )
    grouped = weight.unflatten(1, (len(scales), -1))
    torch.addcmul(offsets, grouped, factors, out=grouped)
    return weight.transpose(0, 1).reshape(width, stop - start).T


@cache
def unpacking_pays() -> bool:
    """Whether torch packs in the order that `unpack` reads, and this processor multiplies bfloat16 itself.

    The order is torch's own and another for other vectors: a matrix is packed to see.
    """
    if not multiplies_bfloat16():
        return False
    q = torch.arange(_BLOCK * 32).mul(7).add(torch.arange(_BLOCK * 32) // 32).remainder(16)
    q = q.view(_BLOCK, 32).to(torch.uint8)
    return torch.equal(_nibbles(pack(q).view(1, 32, _BLOCK // 2))[0].T, q)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [blocks, in, 64] of [blocks, in, 32]: the low halves are outputs 0 to 31 of a block."""
    half = packed.shape[2]
    values = packed.new_empty(*packed.shape[:2], 2 * half)
    torch.bitwise_and(packed, 15, out=values[..., :half])
    torch.bitwise_right_shift(packed, 4, out=values[..., half:])
    return values
