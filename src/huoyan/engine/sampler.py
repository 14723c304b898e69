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
    allowed: Tensor | None = None
    """bool [vocab] on the logits' device: what a grammar lets follow."""
    key: int = 0
    """What the draw depends on: see `huoyan.engine.noise.mix`."""


def needs_counts(params: SamplingParams) -> bool:
    """Whether a request has penalties."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def process_logits(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Bias, `min_tokens`, penalties and grammars: float32 [R, vocab] -> the same, `logits` untouched.

    Where a grammar has come to its end before `min_tokens`, the grammar has its way.
    """
    biased = [i for i, row in enumerate(rows) if row.params.logit_bias]
    held = [i for i, row in enumerate(rows) if _holds_back(row)]
    penalised = [i for i, row in enumerate(rows) if row.counts is not None and needs_counts(row.params)]
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
    tables = [(i, rows[i].params, rows[i].counts) for i in which]
    places = np.concatenate([t.ids + i * out.shape[1] for i, _, t in tables if t is not None])
    sizes = [len(t.ids) for _, _, t in tables if t is not None]
    columns = np.empty((4, len(places)), np.float32)
    np.concatenate([t.counts for _, _, t in tables if t is not None], out=columns[0])
    for column, name in enumerate(("repetition_penalty", "frequency_penalty", "presence_penalty"), 1):
        columns[column] = np.repeat([getattr(p, name) for _, p, _ in tables], sizes)
    index = torch.from_numpy(places).to(out.device, non_blocking=True)
    times, repetition, frequency, presence = torch.from_numpy(columns).to(out.device, non_blocking=True)
    flat = out.view(-1)
    x = flat[index]
    x = torch.where(x > 0, x / repetition, x * repetition)
    flat[index] = x - frequency * times - presence * (times > 0)


def _guide(out: Tensor, logits: Tensor, rows: Sequence[SamplingRow], which: list[int]) -> None:
    allowed = torch.stack([a for i in which if (a := rows[i].allowed) is not None])
    index = torch.tensor(which).to(out.device)
    guided = out[index].masked_fill_(~allowed, float("-inf"))
    # Bias cannot, but `min_tokens` can have barred all that the grammar allows.
    stuck = guided.amax(1, keepdim=True) == float("-inf")
    out[index] = torch.where(stuck, logits[index].masked_fill_(~allowed, float("-inf")), guided)


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[ChosenToken]:
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
    return _report(logits, chosen, rows)


def _report(logits: Tensor, chosen: Tensor, rows: Sequence[SamplingRow]) -> list[ChosenToken]:
    """Put log-probabilities to the chosen tokens."""
    normaliser = logits.logsumexp(-1)
    own = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
    tokens, values = chosen.tolist(), (own - normaliser).tolist()
    reports: dict[int, TokenLogprobs] = {}
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if wanted:
        index = torch.tensor(wanted).to(logits.device, non_blocking=True)
        some = logits if len(wanted) == len(rows) else logits[index]
        ranks = ((some > own[index].unsqueeze(1)).sum(1) + 1).tolist()
        tops = _top(some, normaliser[index], [rows[i].params.logprobs or 0 for i in wanted])
        for i, rank, top in zip(wanted, ranks, tops, strict=True):
            reports[i] = _entry(tokens[i], Logprob(values[i], rank), top)
    return [
        ChosenToken(token, value, reports.get(i))
        for i, (token, value) in enumerate(zip(tokens, values, strict=True))
    ]


def _top(logits: Tensor, normaliser: Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """The `counts[i]` likeliest tokens of each row, likeliest first."""
    most = min(max(counts), logits.shape[1])
    best = logits.topk(most) if most else None
    if best is None:
        return [{} for _ in counts]
    values = (best.values - normaliser.unsqueeze(1)).tolist()
    return [
        {t: Logprob(v, rank) for rank, (t, v) in enumerate(zip(ids[:count], row[:count], strict=True), 1)}
        for count, ids, row in zip(counts, best.indices.tolist(), values, strict=True)
    ]


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
    out = []
    for width, count, ids, values in zip(
        widths, asked, best.indices.tolist(), (best.values - normaliser).tolist(), strict=True
    ):
        ranked = [Logprob(value, rank) for rank, value in enumerate(values, 1)]
        top: TokenLogprobs | None = None
        if count is not None:
            # Tokens that are barred are no alternatives.
            pairs = zip(ids[:count], ranked[:count], strict=True)
            top = {token: own for token, own in pairs if own.logprob > float("-inf")}
        out.append(
            BeamCandidates(
                [
                    ChosenToken(token, own.logprob, None if top is None else _entry(token, own, top))
                    for token, own in zip(ids[:width], ranked[:width], strict=True)
                    if own.logprob > float("-inf")
                ]
            )
        )
    return out
