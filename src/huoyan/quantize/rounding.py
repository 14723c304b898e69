"""Round-to-nearest int4: each group of inputs of a row gets a scale and a zero point from its extremes."""

from __future__ import annotations

import torch
from torch import Tensor

from huoyan.layers.int4 import Int4Weight

LEVELS = 15


def group_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group: weight [out, in] -> two of [out, in / group_size]."""
    grouped = weight.unflatten(1, (-1, group_size))
    return grouped.amin(-1), grouped.amax(-1)


def round_to_int4(
    weight: Tensor, group_size: int, shrink: Tensor | None = None, scale_dtype: torch.dtype = torch.float16
) -> Int4Weight:
    """Quantize weight [out, in] (float) with asymmetric groups.

    Args:
        shrink: [out, in / group_size] in (0, 1]: how much of each group's range is kept; the rest is clipped.
        scale_dtype: what the scales are rounded to before they are used, as they will be stored.
    """
    scales, zeros = group_parameters(weight, group_size, shrink, scale_dtype)
    grouped = weight.unflatten(1, (-1, group_size))
    q = torch.round(grouped / scales.unsqueeze(-1)) + zeros.unsqueeze(-1)
    return Int4Weight(q.clamp_(0, LEVELS).to(torch.uint8).flatten(1), scales.float(), zeros.float())


def fake_quantize(weight: Tensor, group_size: int, shrink: Tensor | None = None) -> Tensor:
    """What `round_to_int4(weight)` stands for, in the dtype of the weight, without the integers between."""
    scales, zeros = group_parameters(weight, group_size, shrink)
    grouped = weight.unflatten(1, (-1, group_size))
    s, z = scales.to(weight.dtype).unsqueeze(-1), zeros.to(weight.dtype).unsqueeze(-1)
    q = torch.round(grouped / s).add_(z).clamp_(0, LEVELS)
    return q.sub_(z).mul_(s).flatten(1)


def group_parameters(
    weight: Tensor, group_size: int, shrink: Tensor | None, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, float32 [out, in / group_size] both; see `round_to_int4`."""
    low, high = (edge.float() for edge in group_range(weight, group_size))
    if shrink is not None:
        low, high = low * shrink, high * shrink
    # Zero must have a level of its own, or a group of positive weights would not know it.
    low, high = low.clamp(max=0), high.clamp(min=0)
    tiny = torch.finfo(scale_dtype).tiny
    scales = ((high - low) / LEVELS).clamp(min=max(tiny, 1e-7)).to(scale_dtype).float()
    zeros = torch.round(-low / scales).clamp_(0, LEVELS)
    return scales, zeros
