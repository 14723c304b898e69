"""Beam search on tensors, many searches at once, against `BeamSearch` one by one."""

from __future__ import annotations

import random

import pytest
import torch

from huoyan.engine.beam_tensors import BeamRules, BeamTensors, FoundBeam, top_candidates
from tests.sampling.test_beam_policy import EOS, Case, PlainSearch, Tokens, random_case, searched


def advance_all(cases: list[Case]) -> list[list[FoundBeam]]:
    """Searches of one vocabulary, to the end."""
    rules = [
        BeamRules(
            c.params,
            c.prompt_len,
            c.max_tokens,
            max(c.prompt_len + (c.params.max_tokens or 0), c.context),
            EOS,
            c.stops,
        )
        for c in cases
    ]
    search = BeamTensors(rules, torch.device("cpu"))
    vocab = cases[0].table.vocab
    prefixes: list[list[Tokens]] = [[()] * search.width for _ in cases]
    most = max(c.max_tokens for c in cases)
    for step in range(most + 2):
        logits = torch.full((len(cases), search.width, vocab), float("nan"), dtype=torch.float64)
        for g, case in enumerate(cases):
            for b in range(search.width):
                if search.cumulative[g, b] > float("-inf"):
                    logits[g, b] = torch.tensor(case.table.logits(prefixes[g][b]), dtype=torch.float64)
                    if step < case.params.min_tokens:
                        logits[g, b, sorted(case.stops | {EOS})] = float("-inf")
        parents, tokens = search.advance(*top_candidates(logits, 2 * search.width))
        prefixes = [
            [(*prefixes[g][int(p)], int(t)) for p, t in zip(parents[g], tokens[g], strict=True)]
            for g in range(len(cases))
        ]
        if step == most - 1:
            assert search.live() == [False] * len(cases)
    return search.finished()


@pytest.mark.parametrize("part", range(3))
def test_as_one_by_one(seed: int, part: int) -> None:
    rng = random.Random(seed + part)
    drawn = [c for c in (random_case(rng) for _ in range(150)) if not c.params.stop]
    compared = 0
    for vocab in (4, 7, 12):
        cases = [c for c in drawn if c.table.vocab == vocab]
        for case, found in zip(cases, advance_all(cases), strict=True):
            plain = PlainSearch(case)
            plain.run()
            if plain.gap < 1e-9:
                continue
            compared += 1
            everything = searched(
                Case(case.table, case.params.clone(n=case.params.num_sequences), *_sizes(case))
            )
            expected = {tuple(a.token_ids): a for a in everything}
            assert {tuple(f.token_ids) for f in found} == set(expected)
            for beam in found:
                answer = expected[tuple(beam.token_ids)]
                assert beam.cumulative_logprob == pytest.approx(answer.cumulative_logprob, abs=1e-9)
                assert beam.stopped == (answer.finish_reason == "stop")
            scores = [plain.score(tuple(f.token_ids)) for f in found]
            assert scores == sorted(scores, reverse=True)
    assert compared > 60


def _sizes(case: Case) -> tuple[int, int]:
    return case.prompt_len, case.context


def test_top_candidates() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    logprobs, ids = top_candidates(logits, 6)
    expected = logits.log_softmax(-1).topk(6)
    torch.testing.assert_close(logprobs, expected.values)
    assert torch.equal(ids, expected.indices)
    assert top_candidates(logits, 99)[1].shape == (2, 3, 50)
