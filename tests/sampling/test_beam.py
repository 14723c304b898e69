"""Beam search in the engine against a plain reference, on random models: exact sequences and scores.

The reference is written from the description of vLLM 0.5.4's algorithm and shares no code with the engine: it
recomputes every hypothesis from its tokens alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.request import EngineRequest
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.harness import drive
from tests.engine.support import VOCAB, picture, plain_logits, request, tiny_model, words

EOS = 4


@dataclass(frozen=True)
class Hypothesis:
    tokens: tuple[int, ...]
    logprob: float

    def score(self, prompt_len: int, penalty: float, leave_out_eos: bool = True) -> float:
        length = prompt_len + len(self.tokens)
        if leave_out_eos and self.tokens and self.tokens[-1] == EOS:
            length -= 1
        return self.logprob / length**penalty


def reference(model: MiniCPMV, req: EngineRequest, context: int) -> tuple[list[Hypothesis], float]:
    """The best n hypotheses, and the smallest gap between scores that any decision hung on."""
    p = req.params
    k = p.best_of or p.n
    prompt_len = len(req.prompt.token_ids)
    most = min(p.max_tokens or 10**9, context - prompt_len)
    stops = set(p.stop_token_ids or ()) | (set() if p.ignore_eos else {EOS})
    live = [Hypothesis((), 0.0)]
    finished: list[Hypothesis] = []
    gap = float("inf")

    def rank(h: Hypothesis) -> float:
        return h.score(prompt_len, p.length_penalty)

    def close(values: list[float], cut: int) -> float:
        return values[cut - 1] - values[cut] if 0 < cut < len(values) else float("inf")

    while live:
        children = []
        for h in live:
            logits = plain_logits(model, req, list(h.tokens))[-1].double()
            if len(h.tokens) < p.min_tokens:
                logits[sorted(stops | {EOS})] = float("-inf")
            logprobs = logits.log_softmax(-1).tolist()
            children += [Hypothesis((*h.tokens, t), h.logprob + lp) for t, lp in enumerate(logprobs)]
        children.sort(key=lambda h: -h.logprob)
        gap = min(gap, close([c.logprob for c in children], 2 * k))
        running = []
        for child in children[: 2 * k]:
            enough = len(child.tokens) >= p.min_tokens
            if (child.tokens[-1] in stops and enough) or len(child.tokens) >= most:
                finished.append(child)
            else:
                running.append(child)
        finished.sort(key=lambda h: -rank(h))
        gap = min(gap, close([rank(h) for h in finished], k))
        finished = finished[:k]
        running.sort(key=lambda h: -rank(h))
        if not running:
            break
        if len(finished) >= k:
            if p.early_stopping is True:
                break
            worst, best = rank(finished[-1]), running[0]
            if p.early_stopping == "never" and p.length_penalty > 0:
                longest = max(prompt_len + (p.max_tokens or 0), context)
                attainable = best.logprob / longest**p.length_penalty
            else:
                attainable = rank(best)
            gap = min(gap, abs(worst - attainable))
            if worst >= attainable:
                break
        gap = min(gap, close([rank(h) for h in running], k))
        live = running[:k]
    shown = sorted(finished, key=lambda h: -h.score(prompt_len, p.length_penalty, leave_out_eos=False))
    scores = [h.score(prompt_len, p.length_penalty, leave_out_eos=False) for h in shown]
    gap = min([gap, *(a - b for a, b in pairwise(scores))])
    return shown[: p.n], gap


def random_beams(rng: random.Random, count: int) -> list[EngineRequest]:
    out = []
    for i in range(count):
        width = rng.randint(2, 5)
        most = rng.choice([1, 2, 5, 11])
        params = SamplingParams(
            temperature=0,
            use_beam_search=True,
            best_of=width,
            n=rng.randint(1, width),
            length_penalty=rng.choice([0.0, 0.5, 1.0, 2.0, -1.0]),
            early_stopping=rng.choice([True, False, "never"]),
            max_tokens=most,
            min_tokens=rng.choice([0, 0, min(2, most)]),
            stop_token_ids=rng.sample(range(5, VOCAB), rng.choice([0, 6, 20])),
            ignore_eos=rng.random() < 0.3,
        )
        parts = words(rng, rng.randint(1, 25))
        if rng.random() < 0.3:
            parts = [*parts, picture(rng, 2)]
        out.append(request(f"b{i}", parts, params))
    return out


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return tiny_model(23)


def hold(model: MiniCPMV, requests: list[EngineRequest], outputs: dict, context: int) -> int:
    compared = 0
    for req in requests:
        expected, gap = reference(model, req, context)
        got = outputs[req.request_id]
        assert got.error is None
        # A pool too small for all beams at full length shortens the answers, and says so.
        if gap < 1e-4 or got.warnings:
            continue
        compared += 1
        assert [tuple(o.token_ids) for o in got.outputs] == [h.tokens for h in expected]
        for output, hypothesis in zip(got.outputs, expected, strict=True):
            assert output.cumulative_logprob == pytest.approx(hypothesis.logprob, abs=1e-3)
            assert output.finish_reason in ("stop", "length")
    return compared


@pytest.mark.slow
def test_beams_are_the_reference_s(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    requests = random_beams(rng, 40)
    outputs = {}
    for req in requests:
        engine = Engine(model, EngineConfig(num_blocks=200, block_size=4), eos_token_id=EOS)
        outputs |= drive(engine, [req])
    assert hold(model, requests, outputs, 256) > 20


@pytest.mark.slow
def test_many_beam_searches_in_one_batch_with_other_requests(model: MiniCPMV, seed: int) -> None:
    """Small pools: searches are preempted and come back, and nothing changes."""
    rng = random.Random(seed)
    preemptions = 0
    compared = 0
    for _ in range(12):
        if preemptions and compared > 5:
            break
        config = EngineConfig(
            num_blocks=rng.choice([24, 30]), block_size=4, max_num_seqs=12, max_num_batched_tokens=24
        )
        engine = Engine(model, config, eos_token_id=EOS)
        beams = random_beams(rng, 6)
        others = [
            request(
                f"s{i}", words(rng, 9), SamplingParams(temperature=1.0, seed=i, max_tokens=9, ignore_eos=True)
            )
            for i in range(5)
        ]
        mixed = beams + others
        rng.shuffle(mixed)
        outputs = drive(engine, mixed, rng)
        kept = [b for b in beams if outputs[b.request_id].error is None]
        compared += hold(model, kept, outputs, engine.size.max_model_len)
        preemptions += sum(o.metrics.preemptions for o in outputs.values() if o.metrics)
        for other in others:
            alone = drive(Engine(model, EngineConfig(num_blocks=200)), [other])[other.request_id]
            assert alone.outputs[0].token_ids == outputs[other.request_id].outputs[0].token_ids
    assert compared > 5
    assert preemptions, "the pools were never too small: the test tests nothing"


def test_beams_share_the_prompt_s_blocks(model: MiniCPMV) -> None:
    """Three beams of a prompt of 20 blocks need little more than 20."""
    params = SamplingParams(temperature=0, use_beam_search=True, best_of=3, max_tokens=6, ignore_eos=True)
    engine = Engine(model, EngineConfig(num_blocks=34, block_size=4, enable_prefix_caching=False))
    output = drive(engine, [request("b", words(random.Random(0), 80), params)])["b"]
    assert output.error is None
    assert output.metrics is not None
    assert output.metrics.preemptions == 0
    assert len(output.outputs[0].token_ids) == 6


def test_an_aborted_search_gives_its_blocks_back(model: MiniCPMV) -> None:
    params = SamplingParams(
        temperature=0, use_beam_search=True, best_of=4, n=2, max_tokens=50, ignore_eos=True
    )
    engine = Engine(model, EngineConfig(num_blocks=100, block_size=4))
    engine.add_request(request("b", words(random.Random(0), 10), params))
    for _ in range(5):
        engine.step()
    engine.abort_request("b")
    (output,) = engine.step()
    assert {o.finish_reason for o in output.outputs} == {"abort"}
    assert not engine.has_unfinished_requests()
    assert engine.pool.num_free == 100


def test_logprobs_of_beams(model: MiniCPMV) -> None:
    params = SamplingParams(
        temperature=0, use_beam_search=True, best_of=3, n=3, max_tokens=4, ignore_eos=True, logprobs=2
    )
    output = drive(Engine(model, EngineConfig(num_blocks=100)), [request("b", [7, 8, 9], params)])["b"]
    for answer in output.outputs:
        assert answer.logprobs is not None
        total = 0.0
        for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
            assert 2 <= len(entry) <= 3
            total += entry[token].logprob
        assert total == pytest.approx(answer.cumulative_logprob, abs=1e-4)
    torch.manual_seed(0)
