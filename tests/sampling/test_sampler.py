"""The batched sampler against a plain one that takes a row at a time, and its draws against their distribution."""

from __future__ import annotations

import math
import random

import pytest
import torch

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.noise import exponential, hash_bits, mix
from huoyan.engine.sampler import SamplingRow, beam_candidates, process_logits, sample
from huoyan.engine.token_counts import TokenCounts

VOCAB = 211


def plain_process(
    logits: list[float], p: SamplingParams, prompt: list[int], output: list[int], stops: set[int]
) -> list[float]:
    out = list(logits)
    for token, bias in (p.logit_bias or {}).items():
        out[token] += bias
    if len(output) < p.min_tokens:
        for token in stops:
            out[token] = -math.inf
    for token in range(len(out)):
        if token in prompt or token in output:
            out[token] = (
                out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
            )
        count = output.count(token)
        out[token] -= p.frequency_penalty * count + (p.presence_penalty if count else 0.0)
    return out


def plain_support(logits: list[float], p: SamplingParams) -> dict[int, float]:
    """The tokens that may be drawn, with their probabilities."""
    x = [value / p.temperature for value in logits]
    order = sorted(range(len(x)), key=lambda t: -x[t])
    if p.top_k > 0:
        order = order[: p.top_k]
    weights = [math.exp(x[t] - x[order[0]]) for t in order]
    total = sum(weights)
    kept, before = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if before / total >= p.top_p:
            break
        kept.append((token, weight))
        before += weight
    kept = [(t, w) for t, w in kept if w >= p.min_p * kept[0][1]]
    total = sum(w for _, w in kept)
    return {t: w / total for t, w in kept}


def random_case(rng: random.Random) -> tuple[SamplingParams, list[int], list[int], set[int]]:
    greedy = rng.random() < 0.4
    params = SamplingParams(
        temperature=0.0 if greedy else rng.choice([0.3, 1.0, 1.7]),
        top_p=1.0 if greedy else rng.choice([1.0, 0.9, 0.4]),
        top_k=-1 if greedy else rng.choice([-1, 1, 5, 40]),
        min_p=0.0 if greedy else rng.choice([0.0, 0.05, 0.5]),
        repetition_penalty=rng.choice([1.0, 1.3, 0.8]),
        presence_penalty=rng.choice([0.0, 0.7, -1.0]),
        frequency_penalty=rng.choice([0.0, 0.5, -0.3]),
        logit_bias=rng.choice([None, {3: 5.0, 17: -100.0}]),
        min_tokens=rng.choice([0, 4]),
        logprobs=rng.choice([None, 0, 3]),
        max_tokens=20,
    )
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
    output = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 9))]
    return params, prompt, output, {1, 2}


def row_of(
    params: SamplingParams, prompt: list[int], output: list[int], stops: set[int], key: int
) -> SamplingRow:
    """Of every second answer the last token is on its way still."""
    counts = TokenCounts(prompt)
    middle = len(output) // 2
    counts.update(output[:middle])
    late = bool(output) and key % 2
    counts.update(output[:-1] if late else output)
    in_flight = torch.tensor(output[-1]) if late else None
    return SamplingRow(params, len(output), frozenset(stops), counts, in_flight, None, key)


def test_batched_is_plain_row_by_row(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        cases = [random_case(rng) for _ in range(rng.randint(1, 12))]
        logits = 4 * torch.randn(
            len(cases), VOCAB, generator=torch.Generator().manual_seed(rng.randrange(2**31))
        )
        before = logits.clone()
        rows = [row_of(*case, key=mix(rng.randrange(2**40))) for case in cases]
        processed = process_logits(logits, rows)
        chosen = sample(logits, rows).read()
        assert torch.equal(logits, before)
        for i, (params, prompt, output, stops) in enumerate(cases):
            expected = plain_process(logits[i].tolist(), params, prompt, output, stops)
            torch.testing.assert_close(processed[i], torch.tensor(expected), rtol=1e-5, atol=1e-5)
            token = chosen[i].token_id
            if params.temperature == 0:
                assert expected[token] == pytest.approx(max(expected), abs=1e-5)
            else:
                assert token in plain_support(expected, params)
            logprobs = logits[i].double().log_softmax(-1)
            assert chosen[i].logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
            if params.logprobs is None:
                assert chosen[i].logprobs is None
                continue
            found = chosen[i].logprobs
            assert found is not None
            assert found[token].rank == int((logprobs > logprobs[token]).sum()) + 1
            assert (
                set(logprobs.topk(params.logprobs).indices.tolist()) <= set(found)
                if params.logprobs
                else True
            )
            assert len(found) - params.logprobs in (0, 1)


def test_a_seed_gives_the_same_token_in_any_company(seed: int) -> None:
    rng = random.Random(seed)
    cases = [random_case(rng) for _ in range(16)]
    logits = 4 * torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(seed))
    keys = [mix(i, 7) for i in range(16)]
    together = sample(logits, [row_of(*case, key=key) for case, key in zip(cases, keys, strict=True)]).read()
    for i in range(16):
        (alone,) = sample(logits[i : i + 1], [row_of(*cases[i], key=keys[i])]).read()
        assert alone.token_id == together[i].token_id


@pytest.mark.parametrize(
    "changes",
    [{}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.1}, {"temperature": 0.5, "top_k": 20, "top_p": 0.95}],
)
def test_draws_follow_the_distribution(changes: dict[str, float]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **changes})  # type: ignore[arg-type]
    logits = 1.5 * torch.randn(60, generator=torch.Generator().manual_seed(5))
    expected = plain_support(logits.tolist(), params)
    draws = 20_000
    rows = [SamplingRow(params, 0, key=mix(99, i)) for i in range(draws)]
    counts: dict[int, int] = {}
    for token in sample(logits.expand(draws, -1), rows).read():
        counts[token.token_id] = counts.get(token.token_id, 0) + 1
    assert set(counts) <= set(expected)
    chi = sum((counts.get(t, 0) - draws * p) ** 2 / (draws * p) for t, p in expected.items())
    freedom = len(expected) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + 1


def test_noise_is_exponential_and_independent() -> None:
    keys = torch.tensor([[mix(i)] for i in range(64)])
    tokens = torch.arange(4000)
    noise = exponential(keys, tokens)
    assert float(noise.min()) > 0
    assert math.isfinite(float(noise.max()))
    u = -torch.expm1(-noise.double())
    assert float(u.mean()) == pytest.approx(0.5, abs=0.003)
    assert float(u.var()) == pytest.approx(1 / 12, abs=0.002)
    deciles = torch.histc(u, 10, 0, 1) / u.numel()
    assert float((deciles - 0.1).abs().max()) < 0.004
    correlation = torch.corrcoef(u)
    assert float((correlation - torch.eye(64)).abs().max()) < 0.09
    assert float(torch.corrcoef(torch.stack((u[:, :-1].flatten(), u[:, 1:].flatten())))[0, 1].abs()) < 0.01
    some = torch.tensor([17, 3, 3999])
    assert torch.equal(exponential(keys, some), noise[:, some])


def test_keys_and_bits_are_splitmix64() -> None:
    """The first three numbers of SplitMix64 from seed 1234567, as its author published them."""
    key = torch.tensor([[1234567]])
    bits = [int(b) % 2**64 for b in hash_bits(key, torch.tensor([1, 2, 3]))[0]]
    assert bits == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix(5) % 2**64 == int(hash_bits(torch.tensor([[1]]), torch.tensor([5]))[0, 0]) % 2**64


def test_beam_candidates(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, VOCAB, generator=g)
    params = SamplingParams(temperature=0, use_beam_search=True, best_of=4, logprobs=2)
    rows = [SamplingRow(params, 0) for _ in range(3)]
    for found, row in zip(beam_candidates(logits, rows), logits, strict=True):
        best = row.log_softmax(-1).topk(8)
        assert [t.token_id for t in found.tokens] == best.indices.tolist()
        assert [t.logprob for t in found.tokens] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert all(t.logprobs is not None and t.token_id in t.logprobs for t in found.tokens)


def test_banned_tokens_are_no_candidates() -> None:
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[5, 9, 30]] = True
    params = SamplingParams(temperature=0, use_beam_search=True, best_of=4)
    (found,) = beam_candidates(torch.zeros(1, VOCAB), [SamplingRow(params, 0, allowed=allowed)])
    assert {t.token_id for t in found.tokens} == {5, 9, 30}


def test_counts(seed: int) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(VOCAB) for _ in range(30)]
    output = [rng.randrange(VOCAB) for _ in range(400)]
    counts = TokenCounts(prompt)
    for end in range(0, 400, 7):
        counts.update(output[:end])
    twin = counts.fork()
    counts.update([*output, 0])
    twin.update(output)
    for table, tokens in ((counts, [*output, 0]), (twin, output)):
        found = dict(zip(table.ids.tolist(), table.counts.tolist(), strict=True))
        assert found == {t: tokens.count(t) for t in {*prompt, *tokens}}
