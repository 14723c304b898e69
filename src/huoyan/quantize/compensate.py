"""Rounding that makes up for itself: what rounding one input's weights does is taken back by those still to be rounded.

The update is that of GPTQ (Frantar et al. 2022, arXiv:2210.17323), largest inputs first: they have the most others left
to make up for them. Scales and zero points are settled before, from the float weights, so the order leaves no trace in
the layout. What the integers then stand for is brought nearer once more by the scales that fit them best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from huoyan.layers.int4 import Int4Weight
from huoyan.quantize.rounding import LEVELS, group_parameters

DAMPING = 0.03
"""Added to the mean products, as a share of their mean diagonal, so that they can be inverted, and that inputs which
few tokens show are not given up for the others: with a third of it, products of held-out tokens were further off."""
_BLOCK = 128
"""Inputs rounded before what they leave is passed on to all others in one product."""
_CHUNK_VALUES = 2**27


def gram(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean products of the inputs x [T, in], of `weights` [T] or all alike -> float32 [in, in]."""
    total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    if weights is None:
        weights = torch.ones(len(x), device=x.device)
    for part, weight in zip(x.split(8192), weights.split(8192), strict=True):
        total.addmm_((part.float() * weight.unsqueeze(1)).T, part.float())
    return total.div_(weights.sum())


def damp_(products: Tensor) -> Tensor:
    """Put enough on the diagonal of `products` [in, in] for them to be inverted; in place, they can be a gigabyte."""
    diagonal = products.diagonal()
    diagonal += (DAMPING * diagonal.mean()).clamp(min=1e-8)
    return products


def round_compensated(weight: Tensor, products: Tensor, group_size: int) -> Int4Weight:
    """Int4 of weight [out, in] whose products with inputs of mean products [in, in] stay near the float ones.

    Args:
        products: damped, see `damp_`.
    """
    width = weight.shape[1]
    scales, zeros = group_parameters(weight.float(), group_size, None)
    order = products.diagonal().argsort()
    left = weight.float()[:, order]
    q = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    # Row i of the factor says how the inputs before i make up for a change of input i: so the last is rounded first.
    lower = torch.linalg.cholesky(products[order.unsqueeze(1), order])
    factor = torch.linalg.solve_triangular(lower, torch.eye(width, device=weight.device), upper=False)
    del lower
    for last in range(width, 0, -_BLOCK):
        first = max(last - _BLOCK, 0)
        inputs = order[first:last]
        block, own = left[:, first:last], factor[first:last, first:last]
        scale, zero = scales[:, inputs // group_size], zeros[:, inputs // group_size]
        levels, errors = torch.empty_like(block), torch.empty_like(block)
        for i in range(last - first - 1, -1, -1):
            level = torch.round(block[:, i] / scale[:, i]).add_(zero[:, i]).clamp_(0, LEVELS)
            levels[:, i] = level
            errors[:, i] = (block[:, i] - (level - zero[:, i]) * scale[:, i]) / own[i, i]
            block[:, :i].addr_(errors[:, i], own[i, :i], alpha=-1)
        q[:, inputs] = levels.to(torch.uint8)
        left[:, :first].addmm_(errors, factor[first:last, :first], alpha=-1)
    return Int4Weight(q, scales, zeros)


def compensated(weight: Tensor, products: Tensor, group_size: int) -> Int4Weight:
    """Int4 of weight [out, in], rounded and then fitted to inputs of damped mean products [in, in]."""
    return fit_scales(weight, products, round_compensated(weight, products, group_size))


def compensated_error(weight: Tensor, products: Tensor, group_size: int) -> float:
    """What rounding weight [out, in] by `compensated` changes in its products: the mean square,
    summed over the outputs.

    Args:
        products: mean products of the inputs as `gram` gives them, [in, in], and as they are again afterwards.
    """
    diagonal = products.diagonal().clone()
    damp_(products)
    int4 = compensated(weight, products, group_size)
    products.diagonal().copy_(diagonal)
    change = int4.dequantize() - weight.float()
    return float(((change @ products) * change).sum())


def fit_scales(weight: Tensor, products: Tensor, int4: Int4Weight) -> Int4Weight:
    """`int4` with the scales that bring its products nearest those of weight [out, in]: least squares, row by row.

    A row whose error that would not lower, once the scales are rounded as they will be stored, keeps its own.

    Args:
        products: damped mean products of the inputs, [in, in].
    """
    rows = max(_CHUNK_VALUES // weight.shape[1], 1)
    scales = [
        _fitted(
            weight[i : i + rows].float(),
            products,
            *(t[i : i + rows] for t in (int4.q, int4.scales, int4.zeros)),
        )
        for i in range(0, len(weight), rows)
    ]
    return Int4Weight(int4.q, torch.cat(scales), int4.zeros)


def _fitted(weight: Tensor, products: Tensor, q: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    groups = scales.shape[1]
    steps = q.unflatten(1, (groups, -1)).float() - zeros.unsqueeze(-1)
    per_group = weight.shape[1] // groups
    wanted = ((weight @ products).unflatten(1, (groups, -1)) * steps).sum(-1)
    # What a row's groups have to do with each other: the error is s A s - 2 s wanted, but for a constant.
    between = torch.empty(len(weight), groups, groups, device=weight.device)
    for g, part in enumerate(products.split(per_group)):
        between[:, g] = ((steps[:, g] @ part).unflatten(1, (groups, -1)) * steps).sum(-1)

    def error(s: Tensor) -> Tensor:
        total: Tensor = ((between @ s.unsqueeze(-1)).squeeze(-1) * s - 2 * s * wanted).sum(-1)
        return total

    # A group of zeros alone has no scale of its own: a little weight on the old ones decides.
    little = 1e-5 * between.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-20
    fitted = torch.linalg.solve(
        between + torch.diag_embed(little.expand_as(scales)), wanted + little * scales
    )
    fitted = fitted.half().float()
    better = (error(fitted) < error(scales)) & (fitted > 0).all(-1) & fitted.isfinite().all(-1)
    result: Tensor = torch.where(better.unsqueeze(-1), fitted, scales)
    return result
