"""Keys and values in 8 bits: numbers of one byte and float16 scales, one for each group of neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

STORED_AS = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 448.0}
"""What the largest of a group becomes. e5m2 would reach further, but has nothing there that it has not here, and the
scales would come near float16's end."""
SMALLEST_SCALE = 2.0**-24
"""What float16 has next to zero: a group of zeros is not divided by zero."""


def quantize(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] to numbers of `dtype` [..., head_dim] and scales float16 [..., head_dim / group].

    The largest of a group becomes `LARGEST`; numbers are divided by the scale as it is stored, so
    rounding the scale costs nothing.
    """
    largest = LARGEST[dtype]
    grouped = x.float().unflatten(-1, (-1, group))
    scales = (grouped.abs().amax(-1) / largest).clamp_(SMALLEST_SCALE).half()
    scaled = grouped / scales.float().unsqueeze(-1)
    if dtype is torch.int8:
        scaled = scaled.add_(0.5).floor_()
    return scaled.clamp_(-largest, largest).to(dtype).flatten(-2), scales


def dequantize(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, as nearly as there is one: [..., head_dim] in `dtype`."""
    return scale_(numbers.to(dtype), scales)


def scale_(numbers: Tensor, scales: Tensor) -> Tensor:
    """Multiply the groups of `numbers` [..., head_dim], floats, by their scales [..., groups], in place."""
    numbers.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.unsqueeze(-1))
    return numbers
