"""`BeamSearch` alone, on models that are tables: hundreds of small searches against a plain one.

The next token's distribution is a function of the prefix, drawn from a hash of it, so that the plain search can
recompute any hypothesis from its tokens. It keeps nothing between steps but tuples of tokens.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import pytest
import torch

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.answer import Answer, AnswerText, StopRules
from huoyan.engine.beam import BeamSearch
from huoyan.engine.sampler import SamplingRow, beam_candidates
from huoyan.prompt.stop_strings import StopStringMatcher

LETTERS = "abcdefghijklmnopqrstuvwxyz"
EOS = 0
Tokens = tuple[int, ...]


class Table:
    """A language model of `vocab` tokens; `warmth` makes it undecided."""

    def __init__(self, seed: int, vocab: int, warmth: float) -> None:
        self.seed, self.vocab, self.warmth = seed, vocab, warmth
        self.logits = lru_cache(maxsize=None)(self._logits)

    def _logits(self, prefix: Tokens) -> list[float]:
        rng = random.Random(f"{self.seed} {prefix}")
        return [rng.gauss(0, 1) / self.warmth for _ in range(self.vocab)]

    def logprobs(self, prefix: Tokens, barred: frozenset[int]) -> list[float]:
        logits = [-math.inf if t in barred else x for t, x in enumerate(self.logits(prefix))]
        most = max(logits)
        total = most + math.log(sum(math.exp(x - most) for x in logits))
        return [x - total for x in logits]


class Letters:
    """A detokenizer: token 1 is a, 2 is b."""

    def push(self, token_id: int) -> str:
        return LETTERS[token_id - 1]

    def final(self) -> str:
        return ""

    def copy(self) -> Letters:
        return self


@dataclass(frozen=True)
class Case:
    table: Table
    params: SamplingParams
    prompt_len: int
    context: int

    @property
    def max_tokens(self) -> int:
        room = self.context - self.prompt_len
        return room if self.params.max_tokens is None else min(self.params.max_tokens, room)

    @property
    def stops(self) -> frozenset[int]:
        return frozenset(self.params.stop_token_ids or ()) | (
            frozenset() if self.params.ignore_eos else {EOS}
        )


@dataclass(frozen=True)
class Found:
    tokens: Tokens
    logprob: float
    reason: str
    stopped_by: int | str | None


class PlainSearch:
    """The description of the algorithm, word for word; `gap` is the closest call it had to make."""

    def __init__(self, case: Case) -> None:
        self.case, self.p = case, case.params
        self.gap = math.inf

    def logprob(self, tokens: Tokens) -> float:
        total = 0.0
        for i, token in enumerate(tokens):
            barred = self.case.stops | {EOS} if i < self.p.min_tokens else frozenset()
            total += self.case.table.logprobs(tokens[:i], barred)[token]
        return total

    def score(self, tokens: Tokens, length: int | None = None) -> float:
        if length is None:
            length = self.case.prompt_len + len(tokens) - (tokens[-1] == EOS)
        return self.logprob(tokens) / length**self.p.length_penalty

    def ending(self, tokens: Tokens) -> tuple[str, int | str | None] | None:
        if len(tokens) >= self.p.min_tokens:
            if tokens[-1] == EOS and not self.p.ignore_eos:
                return "stop", None
            if tokens[-1] in self.case.stops:
                return "stop", tokens[-1]
            text = "".join(LETTERS[t - 1] for t in tokens)
            met = [s for s in self.p.stop_strings if s in text]
            if met:
                return "stop", max(met, key=len)
        return ("length", None) if len(tokens) == self.case.max_tokens else None

    def cut(self, values: list[float], at: int) -> None:
        if 0 < at < len(values):
            self.gap = min(self.gap, values[at - 1] - values[at])

    def order(self, items: list[Tokens], keep: int) -> list[Tokens]:
        items = sorted(items, key=self.score, reverse=True)
        self.cut([self.score(i) for i in items], keep)
        return items

    def run(self) -> list[Found]:
        k = self.p.num_sequences
        beams: list[Tokens] = [()]
        finished: list[Tokens] = []
        while True:
            children = [
                (*beam, t)
                for beam in beams
                for t in range(self.case.table.vocab)
                if self.logprob((*beam, t)) > -math.inf
            ]
            children.sort(key=self.logprob, reverse=True)
            self.cut([self.logprob(c) for c in children], 2 * k)
            children = children[: 2 * k]
            running = self.order([c for c in children if self.ending(c) is None], k)
            everything = self.order(finished + [c for c in children if self.ending(c)], k)
            finished = everything[:k]
            if not running or (len(finished) == k and self.may_stop(finished[-1], running[0])):
                break
            beams = running[:k]
        return self.shown(finished)

    def may_stop(self, worst: Tokens, best: Tokens) -> bool:
        if self.p.early_stopping is True:
            return True
        attainable = self.score(best)
        if self.p.early_stopping == "never" and self.p.length_penalty > 0:
            longest = max(self.case.prompt_len + (self.p.max_tokens or 0), self.case.context)
            attainable = self.score(best, longest)
        self.gap = min(self.gap, abs(self.score(worst) - attainable))
        return self.score(worst) >= attainable

    def shown(self, finished: list[Tokens]) -> list[Found]:
        def final(tokens: Tokens) -> float:
            return self.score(tokens, self.case.prompt_len + len(tokens))

        finished = sorted(finished, key=final, reverse=True)
        self.gap = min([self.gap, *(final(a) - final(b) for a, b in pairwise(finished))])
        out = []
        for tokens in finished[: self.p.n]:
            ending = self.ending(tokens)
            assert ending is not None
            out.append(Found(tokens, self.logprob(tokens), *ending))
        return out


def searched(case: Case) -> list[Answer]:
    """The same through `BeamSearch`, with candidates from the sampler."""
    p, table = case.params, case.table
    rules = StopRules.of(p, EOS, ())
    longest = max(case.prompt_len + (p.max_tokens or 0), case.context)
    search = BeamSearch(p, case.prompt_len, longest, EOS)
    words = AnswerText(Letters(), StopStringMatcher(p.stop_strings)) if p.stop else None  # type: ignore[arg-type]
    live = [Answer(rules, words, case.max_tokens)]
    steps = 0
    while live:
        logits = torch.tensor([table.logits(tuple(a.token_ids)) for a in live], dtype=torch.float64)
        rows = [SamplingRow(p, len(a.token_ids), rules.held_back) for a in live]
        survivors = search.advance(live, beam_candidates(logits, rows))
        assert len(survivors) <= search.width
        for survivor in survivors:
            parent = live[survivor.parent]
            assert survivor.answer.token_ids == [*parent.token_ids, survivor.token_id]
        live = [s.answer for s in survivors]
        steps += 1
        assert steps <= case.max_tokens
        assert len(search.best(live)) <= p.n
    return search.best([])


def random_case(rng: random.Random) -> Case:
    vocab = rng.choice([4, 7, 12])
    width = rng.randint(2, 5)
    most = rng.choice([1, 2, 3, 5, 8, None])
    prompt_len = rng.choice([1, 2, 9])
    least = rng.choice([0, 0, 0, 1, 2])
    stop = ["ab", "c", "bca"] if rng.random() < 0.25 else None
    params = SamplingParams(
        temperature=0,
        use_beam_search=True,
        best_of=width,
        n=rng.randint(1, width),
        length_penalty=rng.choice([0.0, 0.5, 1.0, 2.0, -1.0]),
        early_stopping=rng.choice([True, False, "never"]),
        max_tokens=most,
        min_tokens=0 if stop else min(least, most or 9),
        stop=stop,
        stop_token_ids=[] if stop else rng.sample(range(1, vocab), rng.choice([0, 0, 1, 2])),
        ignore_eos=not stop and rng.random() < 0.2,
    )
    context = prompt_len + rng.choice([1, 4, 9])
    return Case(Table(rng.randrange(2**30), vocab, rng.choice([0.5, 1.0, 3.0])), params, prompt_len, context)


@pytest.mark.parametrize("part", range(4))
def test_random_tables(seed: int, part: int) -> None:
    rng = random.Random(seed + part)
    compared = 0
    for _ in range(120):
        case = random_case(rng)
        plain = PlainSearch(case)
        expected = plain.run()
        if plain.gap < 1e-9:
            continue
        found = searched(case)
        compared += 1
        assert [tuple(a.token_ids) for a in found] == [f.tokens for f in expected], case.params
        for answer, hypothesis in zip(found, expected, strict=True):
            assert answer.cumulative_logprob == pytest.approx(hypothesis.logprob, abs=1e-9)
            assert (answer.finish_reason, answer.stop_reason) == (hypothesis.reason, hypothesis.stopped_by)
    assert compared > 90


def test_wide_beams_find_the_best_answer_there_is() -> None:
    """Where the width covers every prefix, the search is exhaustive: the best of all answers comes first."""
    for seed in range(10):
        params = SamplingParams(
            temperature=0, use_beam_search=True, best_of=64, max_tokens=3, early_stopping="never"
        )
        case = Case(Table(seed, 4, 1.0), params, 3, 20)
        plain = PlainSearch(case)
        answers = [
            prefix
            for length in (1, 2, 3)
            for prefix in _all(4, length)
            if plain.ending(prefix) and not any(plain.ending(prefix[:i]) for i in range(1, length))
        ]
        best = max(answers, key=lambda a: plain.score(a, 3 + len(a)))
        assert tuple(searched(case)[0].token_ids) == best


def _all(vocab: int, length: int) -> list[Tokens]:
    shorter = [()] if length == 1 else _all(vocab, length - 1)
    return [(*s, t) for s in shorter for t in range(vocab)]


def test_a_narrow_support_gives_fewer_beams() -> None:
    """One token is allowed: the search goes on with one beam, and ends with what it has."""
    params = SamplingParams(temperature=0, use_beam_search=True, best_of=3, n=3, max_tokens=2)
    search = BeamSearch(params, 4, 10, EOS)
    live = [Answer(StopRules.of(params, EOS, ()), None, 2)]
    allowed = torch.tensor([False, True, False])
    steps = 0
    while live:
        rows = [SamplingRow(params, len(a.token_ids), allowed=allowed) for a in live]
        live = [s.answer for s in search.advance(live, beam_candidates(torch.zeros(len(live), 3), rows))]
        assert len(live) <= 1
        steps += 1
    assert steps == 2
    (answer,) = search.best([])
    assert answer.token_ids == [1, 1]
    assert answer.cumulative_logprob == 0.0
