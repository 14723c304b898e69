"""From logits to tokens, for all rows of a step at once.

The order is vLLM 0.5.4's: logit bias, `min_tokens`, penalties (repetition over prompt and answer, then frequency
and presence over the answer), then, for sampled rows, temperature, top-k, top-p, min-p, draw. What is reported as
a token's log-probability is the model's own, before all of these, as in vLLM today; beams, which are ranked by
what they are reported with, are reported after them (`beam_candidates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from huoyan.api.outputs import Logprob, TokenLogprobs
from huoyan.api.sampling_params import SAMPLING_EPS, SamplingParams
from huoyan.engine.answer import ChosenToken
from huoyan.engine.draw import draw
from huoyan.engine.host_copy import HostCopy
from huoyan.engine.token_counts import TokenCounts


@dataclass
class SamplingRow:
    """One row of a step's logits and how to choose from it."""

    params: SamplingParams
    num_output_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    """Not to be chosen before `params.min_tokens`."""
    counts: TokenCounts | None = None
    """Where there are penalties."""
    in_flight: Tensor | None = None
    """int64 [] on the logits' device: a token of the answer that `counts` does not know yet."""
    allowed: Tensor | None = None
    """bool [vocab] on the logits' device: what a grammar lets follow."""
    key: int = 0
    """What the draw depends on: see `huoyan.engine.noise.mix`."""


def process_logits(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Bias, `min_tokens`, penalties and grammars: float32 [R, vocab] -> the same, `logits` untouched.

    Where a grammar has come to its end before `min_tokens`, the grammar has its way.
    """
    biased = [i for i, row in enumerate(rows) if row.params.logit_bias]
    held = [i for i, row in enumerate(rows) if _holds_back(row)]
    penalised = [i for i, row in enumerate(rows) if row.counts is not None and row.params.has_penalties]
    guided = [i for i, row in enumerate(rows) if row.allowed is not None]
    if not (biased or held or penalised or guided):
        return logits
    out = logits.clone(memory_format=torch.contiguous_format)
    if biased:
        _add_bias(out, rows, biased)
    if held:
        _hold_back(out, rows, held)
    if penalised:
        _penalise(out, rows, penalised)
    if guided:
        _guide(out, logits, rows, guided)
    return out


def _holds_back(row: SamplingRow) -> bool:
    return row.num_output_tokens < row.params.min_tokens and bool(row.stop_token_ids)


def _add_bias(out: Tensor, rows: Sequence[SamplingRow], which: list[int]) -> None:
    vocab = out.shape[1]
    biases = [(i, rows[i].params.logit_bias or {}) for i in which]
    places = torch.tensor([i * vocab + token for i, bias in biases for token in bias])
    values = torch.tensor([value for _, bias in biases for value in bias.values()], dtype=out.dtype)
    out.view(-1).index_add_(0, places.to(out.device), values.to(out.device))


def _hold_back(out: Tensor, rows: Sequence[SamplingRow], which: list[int]) -> None:
    vocab = out.shape[1]
    places = torch.tensor([i * vocab + t for i in which for t in rows[i].stop_token_ids if t < vocab])
    out.view(-1).index_fill_(0, places.to(out.device), float("-inf"))


def _penalise(out: Tensor, rows: Sequence[SamplingRow], which: list[int]) -> None:
    """All rows' penalties in one pass over the tokens that their sequences have."""
    vocab, device = out.shape[1], out.device
    tables = [table for i in which if (table := rows[i].counts) is not None]
    sizes = [len(table.ids) for table in tables]
    starts = np.repeat([i * vocab for i in which], sizes)
    index = torch.from_numpy(np.concatenate([table.ids for table in tables]) + starts)
    index = index.to(device, non_blocking=True)
    times = torch.from_numpy(np.concatenate([table.counts for table in tables])).to(device, non_blocking=True)
    owner = torch.from_numpy(np.repeat(np.arange(len(tables)), sizes)).to(device, non_blocking=True)
    strengths = torch.tensor([_strengths(rows[i].params) for i in which]).to(device, non_blocking=True)
    flat = out.view(-1)
    x = flat[index]
    late = [(n, token) for n, i in enumerate(which) if (token := rows[i].in_flight) is not None]
    if late:
        # Where a table has the token already, it is written over below with one more of its times.
        of_late = torch.tensor([n for n, _ in late]).to(device, non_blocking=True)
        first = torch.tensor([which[n] * vocab for n, _ in late]).to(device, non_blocking=True)
        places = torch.stack([token for _, token in late]) + first
        flat[places] = _penalised(flat[places], torch.ones_like(places), strengths[of_late])
        of_table = index.new_full((len(tables),), -1).index_copy(0, of_late, places)
        times = times + (index == of_table[owner])
    flat[index] = _penalised(x, times, strengths[owner])


def _strengths(params: SamplingParams) -> tuple[float, float, float]:
    return params.repetition_penalty, params.frequency_penalty, params.presence_penalty


def _penalised(x: Tensor, times: Tensor, strengths: Tensor) -> Tensor:
    """Logits [N] of tokens that prompt and answer have, `times` of them in the answer; strengths [N, 3]."""
    repetition, frequency, presence = strengths.unbind(1)
    x = torch.where(x > 0, x / repetition, x * repetition)
    return x - frequency * times - presence * (times > 0)


def _guide(out: Tensor, logits: Tensor, rows: Sequence[SamplingRow], which: list[int]) -> None:
    allowed = torch.stack([a for i in which if (a := rows[i].allowed) is not None])
    index = torch.tensor(which).to(out.device)
    guided = out[index].masked_fill_(~allowed, float("-inf"))
    # Bias cannot, but `min_tokens` can have barred all that the grammar allows.
    stuck = guided.amax(1, keepdim=True) == float("-inf")
    out[index] = torch.where(stuck, logits[index].masked_fill_(~allowed, float("-inf")), guided)


class SampledTokens:
    """Tokens chosen on the device: `ids` int64 [R] at once, all about them when it is read."""

    def __init__(self, logits: Tensor, chosen: Tensor, rows: Sequence[SamplingRow]) -> None:
        self.ids = chosen
        own = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
        normaliser = logits.logsumexp(-1)
        parts = [chosen, own - normaliser]
        self._counts = [row.params.logprobs for row in rows]
        wanted = [i for i, count in enumerate(self._counts) if count is not None]
        if wanted:
            index = torch.tensor(wanted).to(logits.device, non_blocking=True)
            some = logits if len(wanted) == len(rows) else logits[index]
            most = min(max(count or 0 for count in self._counts), logits.shape[1])
            best = some.topk(most)
            ranks = (some > own[index].unsqueeze(1)).sum(1) + 1
            parts += [ranks, best.indices, best.values - normaliser[index].unsqueeze(1)]
        self._copy = HostCopy(*parts)

    def read(self) -> list[ChosenToken]:
        """Waits until they are chosen. A row's log-probabilities are there where its request asks for them."""
        chosen, values, *asked = (part.tolist() for part in self._copy.read())
        reports = iter(zip(*asked, strict=True))
        return [
            ChosenToken(token, value, None if count is None else _report(token, value, count, *next(reports)))
            for token, value, count in zip(chosen, values, self._counts, strict=True)
        ]


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
    """Choose a token for each of `rows` from the model's logits, float32 [R, vocab].

    Greedy rows take the likeliest token, of several the one with the lowest id.
    """
    work = process_logits(logits, rows)
    random = [i for i, row in enumerate(rows) if row.params.temperature >= SAMPLING_EPS]
    if len(random) == len(rows):
        chosen = draw(work, [row.params for row in rows], [row.key for row in rows])
    else:
        chosen = work.argmax(-1)
        if random:
            index = torch.tensor(random).to(logits.device, non_blocking=True)
            chosen[index] = draw(work[index], [rows[i].params for i in random], [rows[i].key for i in random])
    return SampledTokens(logits, chosen, rows)


def _report(
    token: int, value: float, count: int, rank: int, ids: list[int], values: list[float]
) -> TokenLogprobs:
    """The chosen token, and the `count` likeliest ones, likeliest first."""
    best = zip(ids[:count], values[:count], strict=True)
    return _entry(token, Logprob(value, rank), {t: Logprob(v, r) for r, (t, v) in enumerate(best, 1)})


def _entry(token: int, own: Logprob, top: TokenLogprobs) -> TokenLogprobs:
    """The chosen token first, then the likeliest ones."""
    return {token: own, **top}


@dataclass(frozen=True)
class BeamCandidates:
    """For one live beam, the likeliest tokens that may follow it, best first."""

    tokens: list[ChosenToken]


@torch.inference_mode()
def beam_candidates(logits: Tensor, rows: Sequence[SamplingRow]) -> list[BeamCandidates]:
    """The 2k likeliest next tokens of each row, where k is the width of the row's search.

    No more of one live beam can be among the best 2k of all. Rows of any number of searches go together.
    Log-probabilities are those after bias, `min_tokens`, penalties and grammars, as in vLLM 0.5.4: a search
    ranks by them, and an answer's cumulative log-probability is their sum.
    """
    work = process_logits(logits, rows)
    normaliser = work.logsumexp(-1, keepdim=True)
    widths = [2 * row.params.num_sequences for row in rows]
    asked = [row.params.logprobs for row in rows]
    most = max(max(widths), max(count or 0 for count in asked))
    best = work.topk(min(most, work.shape[1]))
    found = zip(best.indices.tolist(), (best.values - normaliser).tolist(), widths, asked, strict=True)
    return [as_candidates(ids, values, width // 2, count) for ids, values, width, count in found]


def as_candidates(ids: list[int], values: list[float], width: int, count: int | None) -> BeamCandidates:
    """A beam's likeliest tokens with their log-probabilities, likeliest first; `width`: of its search.

    `count`: alternatives that the request asks for, all of them among `ids`.
    """
    most = 2 * width
    if count is None:
        pairs = zip(ids[:most], values[:most], strict=True)
        return BeamCandidates([ChosenToken(token, value) for token, value in pairs if value > float("-inf")])
    ranked = [Logprob(value, rank) for rank, value in enumerate(values, 1)]
    # Tokens that are barred are no alternatives.
    alternatives = zip(ids[:count], ranked[:count], strict=True)
    top = {token: own for token, own in alternatives if own.logprob > float("-inf")}
    return BeamCandidates(
        [
            ChosenToken(token, own.logprob, _entry(token, own, top))
            for token, own in zip(ids[:most], ranked[:most], strict=True)
            if own.logprob > float("-inf")
        ]
    )
