"""Sampling. The two draw other random numbers, so a seed gives other answers on each, and the same ones again on
the same; where there is nothing to draw, both must choose alike."""

from __future__ import annotations

import random
from typing import Any

import pytest

from huoyan import SamplingParams
from huoyan.api.outputs import CompletionOutput
from tests.contract.conftest import Pair, picture
from tests.contract.test_answers import PLACE, QUESTIONS, turn

HOT = 2.0
LONG = 48
"""The embedded model is sure of its answers: four of a dozen tokens can be equal even so. Behind their ends it is
not."""


def asked(rng: random.Random) -> dict[str, Any]:
    text = turn(f"{PLACE}\n{rng.choice(QUESTIONS)}")
    return {"prompt": text, "multi_modal_data": {"image": picture(rng)}}


def test_a_seed_repeats_an_answer(pair: Pair, rng: random.Random) -> None:
    """Alone and beside others, on either engine."""
    prompt = asked(rng)
    seed = rng.randrange(2**63)
    params = SamplingParams(temperature=HOT, seed=seed, max_tokens=LONG, ignore_eos=True)
    for llm in pair.both:
        (alone,) = llm.generate([prompt], params, use_tqdm=False)
        beside = llm.generate(
            [asked(rng), prompt, asked(rng)], [params.clone(seed=1), params, params], use_tqdm=False
        )
        assert beside[1].outputs[0].token_ids == alone.outputs[0].token_ids
        others = llm.generate([prompt] * 3, [params.clone(seed=seed ^ i) for i in (1, 2, 3)], use_tqdm=False)
        assert any(other.outputs[0].token_ids != alone.outputs[0].token_ids for other in others)


def test_answers_of_one_request_differ(pair: Pair, rng: random.Random) -> None:
    params = SamplingParams(temperature=HOT, seed=rng.randrange(2**40), n=4, max_tokens=LONG, ignore_eos=True)
    for (output,) in [llm.generate([asked(rng)], params, use_tqdm=False) for llm in pair.both]:
        assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
        assert len({tuple(answer.token_ids) for answer in output.outputs}) > 1


def test_the_best_of_more_answers(pair: Pair, rng: random.Random) -> None:
    """`best_of` draws more and shows the likeliest `n`, in this order."""
    params = SamplingParams(temperature=1.5, seed=7, n=2, best_of=5, max_tokens=12, logprobs=0)
    for (output,) in [llm.generate([asked(rng)], params, use_tqdm=False) for llm in pair.both]:
        assert len(output.outputs) == 2
        scores = [score(answer) for answer in output.outputs]
        assert scores == sorted(scores, reverse=True)
        for answer in output.outputs:
            assert answer.logprobs is not None
            steps = zip(answer.token_ids, answer.logprobs, strict=True)
            assert score(answer) == pytest.approx(sum(s[t].logprob for t, s in steps), abs=1e-3)


def score(answer: CompletionOutput) -> float:
    assert answer.cumulative_logprob is not None
    return answer.cumulative_logprob


def test_filters_that_leave_one_token(pair: Pair, rng: random.Random) -> None:
    """Then sampling is greedy, whatever is drawn: on both engines it gives the greedy answer."""
    prompt = asked(rng)
    greedy = SamplingParams(temperature=0, max_tokens=12)
    ((native, vllm),) = pair.generate([prompt], greedy)
    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"logit_bias": {263: 100.0}}):
        params = greedy.clone(temperature=0.9, **filters)
        ((sampled, theirs),) = pair.generate([prompt], params)
        if "logit_bias" in filters:
            assert sampled.outputs[0].token_ids == theirs.outputs[0].token_ids == [263] * 12
            continue
        assert sampled.outputs[0].token_ids == native.outputs[0].token_ids
        assert theirs.outputs[0].token_ids == vllm.outputs[0].token_ids


def test_changed_logits(pair: Pair, rng: random.Random) -> None:
    """Greedy after bias and penalties: both choose what a plain computation from the native logits chooses."""
    prompt = asked(rng)
    vocab = 1024
    for _ in range(3):
        presence, frequency = rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)
        bias = {rng.randrange(vocab): rng.uniform(-8, 8) for _ in range(40)}
        params = SamplingParams(
            temperature=0,
            max_tokens=12,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=bias,
            logprobs=vocab,
        )
        ((native, vllm),) = pair.generate([prompt], params)
        for output in (native, vllm):
            answer = output.outputs[0]
            assert answer.logprobs is not None
            for i, token in enumerate(answer.token_ids):
                before = answer.token_ids[:i]
                scores = {
                    t: entry.logprob
                    + bias.get(t, 0.0)
                    - frequency * before.count(t)
                    - presence * (t in before)
                    for t, entry in answer.logprobs[i].items()
                }
                assert len(scores) == vocab
                assert scores[token] >= max(scores.values()) - 1e-3


def test_a_repetition_penalty(pair: Pair) -> None:
    """It needs logits, which are not reported: here the request is a fixed one, without ties."""
    prompt = asked(random.Random(3))
    params = SamplingParams(temperature=0, max_tokens=16, repetition_penalty=1.4, ignore_eos=True)
    ((native, vllm),) = pair.generate([prompt], params)
    assert native.outputs[0].token_ids == vllm.outputs[0].token_ids
