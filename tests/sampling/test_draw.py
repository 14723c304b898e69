"""Draws from large vocabularies: candidates decide as the whole row would, ties stay, company does not matter."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.draw import CANDIDATES, Filters, _draw_filtered, _draw_unseen, draw, has_filters
from huoyan.engine.noise import exponential, mix
from tests.sampling.test_sampler import plain_support

VOCAB = 3000


def plain_draw(logits: Tensor, params: SamplingParams, key: int) -> tuple[int, float]:
    """The token drawn from one row, and by how much it beat the next."""
    support = plain_support(logits.double().tolist(), params)
    noise = exponential(torch.tensor([[key]]), torch.arange(len(logits)))[0].double()
    scores = sorted(((p / float(noise[t]), t) for t, p in support.items()), reverse=True)
    margin = 1 - scores[1][0] / scores[0][0] if len(scores) > 1 else 1.0
    return scores[0][1], margin


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.2, 0.7, 1.0, 2.0]),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.5, 1e-6]),
        top_k=rng.choice([-1, -1, 1, 7, 255, 256, 257, 1000, 2999, 3000, 5000]),
        min_p=rng.choice([0.0, 0.0, 0.001, 0.3, 1.0]),
    )


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_batches_draw_what_rows_draw_alone(seed: int, scale: float) -> None:
    """Flat rows are sorted, peaked ones decided by their candidates; both as the plain way has it."""
    rng = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    compared = 0
    # A round may be all near-ties, which nothing is held against.
    for round_ in range(60):
        if round_ >= 6 and compared > 15:
            break
        params = [random_params(rng) for _ in range(rng.randint(1, 12))]
        logits = scale * torch.randn(len(params), VOCAB, generator=g)
        keys = [mix(rng.randrange(2**50)) for _ in params]
        together = draw(logits, params, keys).tolist()
        for i, p in enumerate(params):
            (alone,) = draw(logits[i : i + 1], [p], [keys[i]]).tolist()
            assert alone == together[i]
            token, margin = plain_draw(logits[i], p, keys[i])
            if margin > 1e-4:
                compared += 1
                assert together[i] == token, (p, scale)
    assert compared > 15


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("grain", [None, 0.25])
def test_the_way_of_a_gpu_draws_the_same(seed: int, scale: float, grain: float | None) -> None:
    """`grain` rounds the logits, as 16 bits do, so that many tie at every cut."""
    rng = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    for _ in range(6):
        params = [p for p in (random_params(rng) for _ in range(16)) if has_filters(p)]
        logits = scale * torch.randn(len(params), VOCAB, generator=g)
        if grain:
            logits = (logits / scale / grain).round() * grain * scale
        keys = torch.tensor([[mix(rng.randrange(2**50))] for _ in params])
        filters = Filters.of(params, VOCAB, logits.device)
        want, got = (way(logits.clone(), filters, keys) for way in (_draw_filtered, _draw_unseen))
        assert want.tolist() == got.tolist()


def test_ties_at_the_cut_stay() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :2] = 3.0
    logits[0, 2:7] = 1.0
    for p in (SamplingParams(top_k=4), SamplingParams(top_p=0.005), SamplingParams(min_p=math.exp(-2.01))):
        seen = {draw(logits, [p], [mix(i)]).item() for i in range(400)}
        expected = {0, 1} if p.top_p < 1 else set(range(7))
        assert seen == expected


def test_a_flat_row_needs_more_than_the_candidates() -> None:
    p = SamplingParams(top_p=0.9)
    logits = torch.zeros(1, VOCAB)
    logits[0] -= torch.arange(VOCAB) * 1e-6
    seen = {draw(logits, [p], [mix(i)]).item() for i in range(300)}
    assert len([t for t in seen if t > CANDIDATES]) > 150
    assert max(seen) < 0.91 * VOCAB


def test_barred_tokens_are_never_drawn() -> None:
    """Also where all but one are: a grammar's forced step."""
    logits = torch.full((3, VOCAB), float("-inf"))
    logits[:, 77] = -4.0
    params = [SamplingParams(), SamplingParams(top_k=50, top_p=0.5), SamplingParams(min_p=0.5)]
    for i in range(50):
        assert draw(logits, params, [mix(i), mix(i, 1), mix(i, 2)]).tolist() == [77] * 3


def test_unlikely_tokens_come_as_often_as_they_should() -> None:
    """Noise of too few bits would never draw, or too often, what has a probability of 1e-4."""
    logits = torch.zeros(1000)
    logits[0] = math.log(999 * 9)
    expected = 20_000 * 0.1
    keys = [mix(3, i) for i in range(20_000)]
    tokens = draw(logits.expand(20_000, -1), [SamplingParams()] * 20_000, keys)
    tail = tokens[tokens > 0]
    assert abs(len(tail) - expected) < 5 * math.sqrt(expected)
    assert len(tail.unique()) > 800
    chi = sum((int((tail == t).sum()) - expected / 999) ** 2 / (expected / 999) for t in range(1, 1000))
    assert abs(chi - 998) < 6 * math.sqrt(2 * 998)
