"""The vocabulary's two tables, the head and the embedding, in eight bits with one scale a row.

Only the weights are in eight bits; what they are multiplied with keeps its dtype, and no path keeps a wider copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from huoyan.kernels import decode_kernels_enabled
from huoyan.layers.blocks import linear_by_blocks

LEVELS = 127
_PACKED_ROWS = {torch.bfloat16: 8, torch.float32: 1}
"""Rows up to which torch's int8 product on a CPU is the faster way, for the dtypes that it is exact enough for."""
_PACKED_INPUTS = 32
"""torch's product reads past the end of rows that are no multiple of this."""


@dataclass(frozen=True)
class Int8Weight:
    """A matrix as integers: w[o, i] = q[o, i] * scales[o]; q is int8 [out, in], scales float32 [out]."""

    q: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        weight: Tensor = self.q.float() * self.scales.unsqueeze(1)
        return weight

    def to(self, device: torch.device) -> Int8Weight:
        return Int8Weight(self.q.to(device).contiguous(), self.scales.to(device).contiguous())


def round_to_int8(weight: Tensor) -> Int8Weight:
    """The nearest integers of each row of weight [out, in].

    A scale has eight significant bits, so that it is the same number in float32 and in bfloat16.
    """
    peak = torch.linalg.vector_norm(weight, ord=float("inf"), dim=1, dtype=torch.float32)
    mantissa, exponent = torch.frexp((peak / LEVELS).clamp(min=1e-12))
    scales = torch.ldexp(torch.ceil(mantissa * 256) / 256, exponent)
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in range(0, len(weight), 8192):
        part = slice(rows, rows + 8192)
        q[part] = torch.round(weight[part].float() / scales[part].unsqueeze(1)).to(torch.int8)
    return Int8Weight(q, scales)


class Int8Linear(nn.Module):
    """x [..., in] @ dequantized(weight).T, the weight held in eight bits.

    A few rows go through torch's int8 product (a CPU) or our kernel (CUDA), more through dense blocks.
    """

    q: Tensor
    scales: Tensor

    def __init__(self, weight: Int8Weight) -> None:
        super().__init__()
        self.width_out, self.width_in = weight.q.shape
        self.register_buffer("q", weight.q)
        self.register_buffer("scales", weight.scales)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.width_in)
        few = len(rows) <= _PACKED_ROWS.get(x.dtype, 0) and self.width_in % _PACKED_INPUTS == 0
        if x.device.type == "cpu" and few:
            out: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.q, self.scales.to(x.dtype))
        elif x.is_cuda and self._has_kernel(len(rows)):
            from huoyan.kernels.int8_matmul import int8_matmul

            out = int8_matmul(rows, self.q, self.scales)
        else:
            out = linear_by_blocks(rows, self.width_out, lambda a, b: self.weight_rows(a, b, x.dtype))
        return out.view(*x.shape[:-1], self.width_out)

    def padded(self, x: Tensor) -> Tensor:
        """See `huoyan.layers.linear.Linear.padded`."""
        out: Tensor = self(x)
        return out

    def in_float32(self, x: Tensor) -> Tensor:
        """The result in float32."""
        out: Tensor = self(x).float()
        return out

    def _has_kernel(self, rows: int) -> bool:
        if not decode_kernels_enabled():
            return False
        from huoyan.kernels.int8_matmul import BLOCK, MAX_ROWS

        return rows <= MAX_ROWS and self.width_in % BLOCK == 0

    def weight_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start to stop of the dense weight."""
        weight: Tensor = self.q[start:stop].to(dtype) * self.scales[start:stop].unsqueeze(1).to(dtype)
        return weight


class Int8Embedding(nn.Module):
    """A table of embeddings in eight bits: [T] -> [T, width] of `dtype`."""

    q: Tensor
    scales: Tensor

    def __init__(self, weight: Int8Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("q", weight.q)
        self.register_buffer("scales", weight.scales)

    def forward(self, token_ids: Tensor) -> Tensor:
        # Indexing with brackets would make int32 ids int64 first, twice.
        q, scales = (table.index_select(0, token_ids) for table in (self.q, self.scales))
        rows: Tensor = q.float() * scales.unsqueeze(-1)
        return rows.to(self.dtype)
