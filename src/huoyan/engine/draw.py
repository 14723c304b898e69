"""Random draws from logits under temperature, top-k, top-p and min-p, many rows at once.

Each filter is a floor under the logits of a row; the highest of them holds. Tokens that tie with the last one
kept are kept too, so the outcome does not depend on how a sort breaks ties. Floors are found among a row's
likeliest tokens, and only where these do not decide is the row sorted. On a GPU nobody looks whether they do, since
that would keep the host waiting: there the floor's logit, once found, is held against the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from huoyan.engine.noise import exponential
from huoyan.planning.pieces import NOISE_LOGITS, NOISE_LOGITS_CUDA, SORTED_LOGITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from huoyan.api.sampling_params import SamplingParams

CANDIDATES = 256
"""Likeliest tokens of a row that are looked at first."""
_SORT_ABOVE = 4096


@dataclass
class Filters:
    """Sampling parameters of R rows as tensors [R, 1] on the logits' device."""

    temperature: Tensor
    top_k: Tensor
    """int64; the vocabulary's size for all."""
    top_p: Tensor
    """float64; 2 for all, which no sum of probabilities reaches."""
    log_min_p: Tensor
    """-inf for none."""
    most: int
    """The largest top_k that is set."""
    open_top_p: bool
    """Whether a row has top_p without top_k, so that the probability of all tokens is to be summed."""

    @staticmethod
    def of(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Filters:
        set_k = [p.top_k for p in params if 0 < p.top_k < vocab_size]

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).unsqueeze(1).to(device, non_blocking=True)

        return Filters(
            column([p.temperature for p in params], torch.float32),
            column([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params], torch.int64),
            column([p.top_p if p.top_p < 1 else 2.0 for p in params], torch.float64),
            column([p.min_p for p in params], torch.float32).log_(),
            max(set_k, default=0),
            any(p.top_p < 1 and not 0 < p.top_k < vocab_size for p in params),
        )

    def rows(self, index: Tensor | slice) -> Filters:
        return Filters(
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            self.log_min_p[index],
            self.most,
            self.open_top_p,
        )


def has_filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def draw(logits: Tensor, params: Sequence[SamplingParams], keys: Sequence[int]) -> Tensor:
    """Sampled token ids, int64 [R], of logits float32 [R, vocab]; `keys` as of `huoyan.engine.noise.mix`."""
    device = logits.device
    filtered = [i for i, p in enumerate(params) if has_filters(p)]
    key = torch.tensor(keys, dtype=torch.int64).unsqueeze(1).to(device, non_blocking=True)
    if len(filtered) == len(params):
        filters = Filters.of(params, logits.shape[1], device)
        return (_draw_unseen if device.type == "cuda" else _draw_filtered)(logits, filters, key)
    if not filtered:
        return _draw_whole(logits / Filters.of(params, logits.shape[1], device).temperature, None, key)
    out = torch.empty(len(params), dtype=torch.int64, device=device)
    plain = [i for i in range(len(params)) if not has_filters(params[i])]
    for which in (plain, filtered):
        index = torch.tensor(which).to(device, non_blocking=True)
        out[index] = draw(logits[index], [params[i] for i in which], [keys[i] for i in which])
    return out


def _draw_whole(x: Tensor, floor: Tensor | None, keys: Tensor) -> Tensor:
    """From the whole vocabulary, or what of it reaches `floor: [R, 1]`; x is used up."""
    tokens = torch.arange(x.shape[1], device=x.device)
    step = max((NOISE_LOGITS_CUDA if x.is_cuda else NOISE_LOGITS) // x.shape[1], 1)
    parts = []
    for first in range(0, len(x), step):
        some = x[first : first + step]
        barred = None if floor is None else some < floor[first : first + step]
        weights = some.sub_(some.amax(1, keepdim=True)).exp_()
        if barred is not None:
            weights.masked_fill_(barred, 0.0)
        parts.append(weights.div_(exponential(keys[first : first + step], tokens)).argmax(1))
    return torch.cat(parts)


def _draw_unseen(logits: Tensor, filters: Filters, keys: Tensor) -> Tensor:
    """What `_draw_filtered` draws, by a way that depends on the parameters alone and never on the logits."""
    x = logits / filters.temperature
    wide = x.shape[1] if filters.open_top_p else min(max(filters.most, 1), x.shape[1])
    step = max(SORTED_LOGITS // wide, 1)
    floors = []
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        floors.append(_floors(x[rows].topk(wide).values, x[rows], filters.rows(rows), tied=True)[1])
    return _draw_whole(x, torch.cat(floors), keys)


def _draw_filtered(logits: Tensor, filters: Filters, keys: Tensor) -> Tensor:
    vocab = logits.shape[1]
    x = logits / filters.temperature
    wide = max(CANDIDATES, filters.most + 1)
    if wide >= vocab or wide > _SORT_ABOVE:
        return _draw_sorted(x, filters, keys)
    values, ids = x.topk(wide)
    least_k, floor = _floors(values, x, filters)
    out = _pick(values, ids, floor, keys)
    # Tokens that were not looked at might be above the floor, or tie with the last of top_k and so count in its
    # sum, unless even the last one looked at is barred.
    last, bar = values[:, -1:], torch.where(least_k > float("-inf"), least_k, floor)
    undecided = ((last >= bar) & (last > float("-inf"))).squeeze(1).nonzero().squeeze(1)
    if len(undecided):
        out[undecided] = _draw_sorted(x[undecided], filters.rows(undecided), keys[undecided])
    return out


def _draw_sorted(x: Tensor, filters: Filters, keys: Tensor) -> Tensor:
    step = max(SORTED_LOGITS // x.shape[1], 1)
    if len(x) > step:
        pieces = [slice(first, first + step) for first in range(0, len(x), step)]
        return torch.cat([_draw_sorted(x[rows], filters.rows(rows), keys[rows]) for rows in pieces])
    values, ids = x.sort(descending=True)
    return _pick(values, ids, _floors(values, x, filters)[1], keys)


def _floors(values: Tensor, x: Tensor, filters: Filters, *, tied: bool = False) -> tuple[Tensor, Tensor]:
    """The least logits that top-k and that all filters let through, [R, 1] each, where `values` [R, C] has them:
    sorted, the likeliest of x.

    `tied`: tokens beyond the C-th may tie with it, and count.
    """
    top = values[:, :1]
    width = values.shape[1]
    last = values.gather(1, filters.top_k.clamp(max=width) - 1)
    least_k = torch.where(filters.top_k <= width, last, float("-inf"))
    # Sums in float64: what is kept must not depend on how many candidates were looked at.
    weights = (values - top).exp_().double().masked_fill_(values < least_k, 0.0)
    mass = weights.sum(1, keepdim=True)
    if tied and width < x.shape[1]:
        mass = (x - top).exp_().double().masked_fill_(x < least_k, 0.0).sum(1, keepdim=True)
    if filters.open_top_p:
        everything = (x.logsumexp(1, keepdim=True) - top).double().exp_()
        mass = torch.where(filters.top_k < x.shape[1], mass, everything)
    before = weights.cumsum(1) - weights
    kept = (before < filters.top_p * mass).sum(1, keepdim=True).clamp_(min=1)
    least_p = values.gather(1, kept - 1)
    least_p = torch.where(filters.top_p > 1, float("-inf"), least_p)
    return least_k, torch.maximum(torch.maximum(least_k, least_p), top + filters.log_min_p)


def _pick(values: Tensor, ids: Tensor, floor: Tensor, keys: Tensor) -> Tensor:
    weights = (values - values[:, :1]).exp_().masked_fill_(values < floor, 0.0)
    return ids.gather(1, weights.div_(exponential(keys, ids)).argmax(1, keepdim=True)).squeeze(1)
