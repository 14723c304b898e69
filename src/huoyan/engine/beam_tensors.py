"""`BeamSearch` on tensors: many searches advance together on the device, and the host looks when it wants to.

The same decisions as in `huoyan.engine.beam`, save that stop strings, which need text, are the host's. Nothing
here waits for the device or has a shape that depends on values, and all state is updated in place: a step can be
captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from huoyan.api.sampling_params import SamplingParams

_NEVER = float("-inf")
_EARLY = {False: 0, True: 1, "never": 2}


@dataclass(frozen=True)
class BeamRules:
    """What one search goes by."""

    params: SamplingParams
    prompt_len: int
    max_tokens: int
    longest: int
    """As of `BeamSearch`."""
    eos_token_id: int | None
    stop_token_ids: frozenset[int]
    """Every token that ends an answer, the checkpoint's where the request does not ignore them."""


@dataclass(frozen=True)
class FoundBeam:
    """A finished hypothesis."""

    token_ids: list[int]
    cumulative_logprob: float
    stopped: bool
    """By its last token; otherwise by its length."""


def top_candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row: logits [..., vocab] → log-probabilities and ids [..., count]."""
    count = min(count, logits.shape[-1])
    best = logits.topk(count)
    return best.values - logits.logsumexp(-1, keepdim=True), best.indices


class BeamTensors:
    """G searches of up to K beams, which take their steps together; all begin with one beam."""

    def __init__(self, searches: Sequence[BeamRules], device: torch.device) -> None:
        self.searches = list(searches)
        count, width = len(self.searches), max(s.params.num_sequences for s in self.searches)
        self.width = width

        def column(values: list[float] | list[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        def table(fill: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((*shape, count, width), fill, dtype=dtype, device=device)

        self._widths = column([s.params.num_sequences for s in self.searches])
        self._penalty = column([s.params.length_penalty for s in self.searches], torch.float64)
        self._early = column([_EARLY[s.params.early_stopping] for s in self.searches])
        self._prompt_len = column([s.prompt_len for s in self.searches])
        self._longest = column([s.longest for s in self.searches])
        self._max_tokens = column([s.max_tokens for s in self.searches])
        self._min_tokens = column([s.params.min_tokens for s in self.searches])
        self._eos = column([-1 if s.eos_token_id is None else s.eos_token_id for s in self.searches])
        most_stops = max(1, *(len(s.stop_token_ids) for s in self.searches))
        padded = [[*s.stop_token_ids] + [-1] * (most_stops - len(s.stop_token_ids)) for s in self.searches]
        self._stops = torch.tensor(padded, dtype=torch.int64, device=device)

        self.cumulative = table(_NEVER, torch.float64)
        """[G, K]: of the live beams; -inf where there is none. A search without live beams is over."""
        self.cumulative[:, 0] = 0.0
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        """Tokens that every live beam has."""
        longest_answer = max(s.max_tokens for s in self.searches)
        self._tokens = table(0, torch.int64, longest_answer)
        self._parents = table(0, torch.int64, longest_answer)
        self._score = table(_NEVER, torch.float64)
        self._finished: dict[str, Tensor] = {
            "cumulative": table(_NEVER, torch.float64),
            "step": table(0, torch.int64),
            "parent": table(0, torch.int64),
            "token": table(0, torch.int64),
            "stopped": table(0, torch.bool),
        }

    def advance(self, logprobs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step.

        Args:
            logprobs, ids: [G, K, C] of `top_candidates` for each live beam, C at least 2K or the vocabulary;
                rows of beams that do not live are ignored.

        Returns:
            parents and tokens int64 [G, K] of the beams that live on; where `cumulative` is -inf, any.
        """
        parents, tokens, totals = self._children(logprobs, ids)
        self.step += 1
        stopped = (tokens.unsqueeze(2) == self._stops.unsqueeze(1)).any(2) & (self.step >= self._min_tokens)
        ends = stopped | (self.step >= self._max_tokens)
        length = self._prompt_len + self.step - (tokens == self._eos).long()
        scores = totals / length.double() ** self._penalty

        barred = torch.full_like(scores, _NEVER)
        self._keep_finished(torch.where(ends, scores, barred), totals, parents, tokens, stopped)
        place = torch.arange(self.width, device=tokens.device)
        best = torch.where(ends, barred, scores).topk(self.width)
        alive = (best.values > _NEVER) & (place < self._widths)
        alive &= ~self._may_stop(best.values[:, :1], totals.gather(1, best.indices[:, :1]))
        parents, tokens = parents.gather(1, best.indices), tokens.gather(1, best.indices)
        self.cumulative.copy_(torch.where(alive, totals.gather(1, best.indices), barred[:, : self.width]))
        now = (self.step - 1).clamp(max=len(self._tokens) - 1).expand(1)
        self._tokens.index_copy_(0, now, tokens.unsqueeze(0))
        self._parents.index_copy_(0, now, parents.unsqueeze(0))
        return parents, tokens

    def live(self) -> list[bool]:
        """Which searches go on. Waits for the device."""
        return (self.cumulative > _NEVER).any(1).tolist()

    def finished(self) -> list[list[FoundBeam]]:
        """The finished hypotheses of each search, best score first. Waits for the device."""
        tokens, parents = self._tokens.tolist(), self._parents.tolist()
        found = {name: value.tolist() for name, value in self._finished.items()}
        out = []
        for g in range(len(self.searches)):
            beams = []
            for i in range(self.width):
                if found["cumulative"][g][i] == _NEVER:
                    break
                ids, slot = [found["token"][g][i]], found["parent"][g][i]
                for step in range(found["step"][g][i] - 2, -1, -1):
                    ids.append(tokens[step][g][slot])
                    slot = parents[step][g][slot]
                beams.append(FoundBeam(ids[::-1], found["cumulative"][g][i], found["stopped"][g][i]))
            out.append(beams)
        return out

    def _children(self, logprobs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The 2k likeliest children of each search: parents, tokens, cumulative log-probabilities [G, 2K]."""
        per_beam = logprobs.shape[2]
        totals = (self.cumulative.unsqueeze(2) + logprobs).flatten(1)
        # -inf and nan of beams that do not live, and of tokens that are barred.
        totals = torch.where(totals > _NEVER, totals, _NEVER)
        if totals.shape[1] < 2 * self.width:
            short = 2 * self.width - totals.shape[1]
            totals = torch.nn.functional.pad(totals, (0, short), value=_NEVER)
            ids = torch.nn.functional.pad(ids.flatten(1), (0, short)).unsqueeze(1)
        best = totals.topk(2 * self.width)
        place = torch.arange(2 * self.width, device=totals.device)
        kept = torch.where(place < 2 * self._widths, best.values, _NEVER)
        parents = (best.indices // per_beam).clamp_(max=self.width - 1)
        return parents, ids.flatten(1).gather(1, best.indices), kept

    def _keep_finished(
        self, scores: Tensor, totals: Tensor, parents: Tensor, tokens: Tensor, stopped: Tensor
    ) -> None:
        """Of the finished hypotheses so far and the new ones keep the best k; all [G, 2K]."""
        new = {
            "cumulative": torch.where(scores > _NEVER, totals, _NEVER),
            "step": self.step.expand_as(tokens),
            "parent": parents,
            "token": tokens,
            "stopped": stopped,
        }
        best = torch.cat((self._score, scores), 1).topk(self.width)
        kept = torch.arange(self.width, device=scores.device) < self._widths
        for name, old in self._finished.items():
            old.copy_(torch.cat((old, new[name]), 1).gather(1, best.indices))
        self._finished["cumulative"].masked_fill_(~kept, _NEVER)
        self._score.copy_(torch.where(kept, best.values, _NEVER))

    def _may_stop(self, best_score: Tensor, best_total: Tensor) -> Tensor:
        """Whether there are k finished hypotheses and no live beam may do better: bool [G, 1]."""
        worst = self._score.gather(1, self._widths - 1)
        grown = best_total / self._longest.double() ** self._penalty
        at_best = torch.where((self._early == 2) & (self._penalty > 0), grown, best_score)
        return (worst > _NEVER) & ((self._early == 1) | (worst >= at_best))
