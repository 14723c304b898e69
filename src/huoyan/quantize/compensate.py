"""Rounding that makes up for itself: what rounding one input's weights does is taken back by the inputs that follow.

The order and the update are those of GPTQ (Frantar et al. 2022, arXiv:2210.17323) without reordering the inputs,
so that the result has the layout of any other: each group's scale and zero point, then one integer a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from huoyan.layers.int4 import Int4Weight
from huoyan.quantize.rounding import LEVELS, group_parameters

DAMPING = 0.01
"""Added to the mean products, as a share of their mean diagonal, so that they can be inverted."""


def gram(x: Tensor) -> Tensor:
    """Mean products of the inputs x [T, in] -> float32 [in, in]."""
    total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for part in x.split(8192):
        total.addmm_(part.float().T, part.float())
    return total / len(x)


def damped(products: Tensor) -> Tensor:
    """`products` [in, in] with enough on the diagonal to be inverted."""
    diagonal = products.diagonal()
    return products + torch.diag((DAMPING * diagonal.mean()).clamp(min=1e-8).expand_as(diagonal))


def round_compensated(
    weight: Tensor, products: Tensor, group_size: int, shrink: Tensor | None = None
) -> Int4Weight:
    """Int4 of weight [out, in] whose products with inputs of mean products [in, in] stay near the float ones.

    Args:
        shrink: [out, in / group_size] in (0, 1]: how much of each group's range is kept.
    """
    left = weight.float().clone()
    q = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    groups = weight.shape[1] // group_size
    scales = torch.empty(weight.shape[0], groups, device=weight.device)
    zeros = torch.empty_like(scales)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(products)))
    # Row i of the upper factor says how what is left after inputs 0 to i makes up for a change of input i.
    factor = torch.linalg.cholesky(inverse, upper=True)
    for group in range(groups):
        first, last = group * group_size, (group + 1) * group_size
        block, own = left[:, first:last], factor[first:last, first:last]
        share = None if shrink is None else shrink[:, group : group + 1]
        scale, zero = group_parameters(block, group_size, share)
        scales[:, group], zeros[:, group] = scale[:, 0], zero[:, 0]
        errors = torch.empty_like(block)
        for i in range(group_size):
            column = block[:, i]
            levels = (torch.round(column / scale[:, 0]) + zero[:, 0]).clamp_(0, LEVELS)
            q[:, first + i] = levels.to(torch.uint8)
            errors[:, i] = (column - (levels - zero[:, 0]) * scale[:, 0]) / own[i, i]
            block[:, i + 1 :] -= torch.outer(errors[:, i], own[i, i + 1 :])
        left[:, last:] -= errors @ factor[first:last, last:]
    return Int4Weight(q, scales, zeros)
