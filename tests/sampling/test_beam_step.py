"""Beam searches on tensors, many at once, against `BeamSearch` one by one: decision for decision, bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from huoyan.engine.answer import Answer, StopRules
from huoyan.engine.beam import BeamSearch
from huoyan.engine.beam_ops import BeamOps
from huoyan.engine.beam_orders import search_orders
from huoyan.engine.device_beams import BeamStep
from huoyan.engine.host_copy import HostCopy
from huoyan.layers.beam_step import top_candidates
from tests.sampling.test_beam_policy import EOS, Case, random_case


@dataclass(eq=False)
class Searched:
    """Of a `Group` what its search is about."""

    case: Case
    grain: float
    beams: BeamSearch = field(init=False)
    live_answers: list[Answer] = field(init=False)
    known_to_host: bool = True

    def __post_init__(self) -> None:
        case, params = self.case, self.case.params
        longest = max(case.prompt_len + (params.max_tokens or 0), case.context)
        self.beams = BeamSearch(params, case.prompt_len, longest, EOS)
        self.live_answers = [Answer(StopRules.of(params, EOS, ()), None, case.max_tokens)]
        self.params, self.width = params, params.num_sequences

    @property
    def sequences(self) -> list[SimpleNamespace]:
        first = self.live_answers[0]
        in_flight = 1 if self.known_to_host else 2
        return [SimpleNamespace(answer=first, num_outputs=len(first.token_ids) + 1, num_in_flight=in_flight)]

    def logits(self) -> list[list[float]]:
        """Of the live beams, rounded so that many are equal."""
        rows = [self.case.table.logits(tuple(answer.token_ids)) for answer in self.live_answers]
        return [[round(x / self.grain) * self.grain for x in row] for row in rows]


def step(searches: list[Searched], before: BeamStep | None) -> BeamStep:
    """What the engine does of a step: candidates, decisions on tensors, and their way to the host."""
    logits: list[list[float]] = []
    rows: dict[Searched, list[int]] = {}
    for search in searches:
        own = search.logits()
        rows[search] = list(range(len(logits), len(logits) + len(own)))
        logits += own
    known = before.searches if before else {}
    orders = search_orders(rows, known, torch.device("cpu"))  # type: ignore[arg-type]
    state = before.state if before else None
    found, state = BeamOps().advance(torch.tensor(logits), orders, state, 2 * orders.width)
    return BeamStep({s: i for i, s in enumerate(searches)}, found, state, HostCopy(found))  # type: ignore[misc]


@pytest.mark.parametrize("grain", [0.5, 1e-6])
def test_as_one_by_one(seed: int, grain: float) -> None:
    rng = random.Random(seed)
    steps = ended = fewer = 0
    for vocab in (4, 7, 12):
        cases = [c for c in (random_case(rng) for _ in range(300)) if c.table.vocab == vocab]
        waiting = [Searched(c, grain) for c in cases if not c.params.stop and not c.params.min_tokens]
        running: list[Searched] = []
        before: BeamStep | None = None
        while running or waiting:
            # They come one after the other, and one is now and then taken up again from what the host knows.
            while waiting and len(running) < 6:
                running.append(waiting.pop())
            for search in running:
                new = before is None or search not in before.searches
                search.known_to_host = new or rng.random() < 0.2
            rng.shuffle(running)
            before = step(running, before)
            steps += 1
            for search, decided in before.read().items():
                live = search.live_answers
                survivors = search.beams.advance(live, decided.candidates[: len(live)])
                decided.check(survivors, search.width)
                assert [(s.parent, s.token_id) for s in survivors] == [d[:2] for d in decided.survivors]
                fewer += 0 < len(survivors) < search.width
                sums, scores = before.state[before.searches[search]].tolist()
                answers = [s.answer for s in survivors]
                assert sums[: len(answers)] == [a.cumulative_logprob for a in answers]
                assert set(sums[len(answers) :]) <= {float("-inf")}
                finished = search.beams.finished
                assert scores[: len(finished)] == [search.beams.score(a) for a in finished]
                assert set(scores[len(finished) :]) <= {float("-inf")}
                search.live_answers = answers
                if not answers:
                    running.remove(search)
                    ended += 1
    assert steps > 30
    assert ended > 100
    assert fewer, "no search had fewer beams than its width"


def test_whose_blocks_a_beam_takes(seed: int) -> None:
    """The first child of a beam keeps its parent's; the others get those of childless beams, in their order."""
    rng = random.Random(seed)
    for _ in range(30):
        search = Searched(random_case(rng), 1e-6)
        if search.params.stop or search.params.min_tokens:
            continue
        before: BeamStep | None = None
        while search.live_answers:
            search.known_to_host = before is None
            before = step([search], before)
            ((_, decided),) = before.read().items()
            live = search.live_answers
            parents = [parent for parent, _, _ in decided.survivors]
            childless = iter([i for i in range(search.width) if i not in parents])
            for i, (parent, _, block) in enumerate(decided.survivors):
                assert block == (next(childless) if parent in parents[:i] else parent)
            blocks = before.found[0, : search.width, 2].tolist()
            assert sorted(blocks) == list(range(search.width))
            survivors = search.beams.advance(live, decided.candidates[: len(live)])
            search.live_answers = [s.answer for s in survivors]


def test_top_candidates() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    logprobs, ids = top_candidates(logits, 6)
    expected = logits.log_softmax(-1).topk(6)
    torch.testing.assert_close(logprobs, expected.values)
    assert torch.equal(ids, expected.indices)
    assert top_candidates(logits, 99)[1].shape == (2, 3, 50)
