"""Beam search, which vLLM's engine has not: our policy over vLLM's log-probabilities must give the native beams.

The requests are fixed ones. Where two beams tie at the edge of a search, rounding alone decides which lives on and
all that follows; with random requests one such tie in some hundred runs would fail the comparison.
"""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from huoyan import SamplingParams
from huoyan.api.beam_search import BeamSearchParams
from tests.contract.conftest import MEDIA, Pair
from tests.contract.test_answers import PLACE, turn

PLANE = {
    "prompt": turn(f"{PLACE}\n请描述这张图片"),
    "multi_modal_data": {"image": Image.open(MEDIA / "airplane.jpg").convert("RGB")},
}
STARS = {
    "prompt": turn(f"{PLACE}{PLACE}\nWhat changed between the two pictures?"),
    "multi_modal_data": {
        "image": [Image.open(MEDIA / name).convert("RGB") for name in ("stars.jpg", "stars_later.jpg")]
    },
}
WORDS = {"prompt": turn("天空是什么颜色？")}

SEARCHES: tuple[dict[str, Any], ...] = (
    {"best_of": 3},
    {"best_of": 3, "n": 3, "length_penalty": 0.0},
    {"best_of": 2, "n": 2, "length_penalty": 2.0, "early_stopping": True},
    {"best_of": 4, "n": 4, "early_stopping": "never"},
    {"best_of": 3, "n": 3, "ignore_eos": True, "max_tokens": 10},
    {"best_of": 3, "n": 3, "stop": ["飞", "the", "星"]},
    {"best_of": 3, "n": 2, "min_tokens": 5, "max_tokens": 9},
    {"best_of": 3, "n": 3, "logit_bias": {263: -6.0, 540: 2.0}, "max_tokens": 7},
    {"best_of": 3, "n": 3, "presence_penalty": 0.8, "frequency_penalty": 0.4, "max_tokens": 7},
    {"best_of": 2, "n": 2, "structured_outputs": {"regex": "[a-c]{2,3} (cat|dog)"}, "max_tokens": 8},
)


def search(fields: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "use_beam_search": True, "max_tokens": 20, **fields})


def test_the_beams_of_both(pair: Pair) -> None:
    """Same beams, same order, same scores, same ends."""
    prompts = [(PLANE, STARS, WORDS)[i % 3] for i in range(len(SEARCHES))]
    for fields, (native, vllm) in zip(
        SEARCHES, pair.generate(prompts, [search(fields) for fields in SEARCHES]), strict=True
    ):
        assert (native.error, vllm.error) == (None, None)
        mine, theirs = native.outputs, vllm.outputs
        assert len(theirs) == fields.get("n", 1)
        assert [a.token_ids for a in mine] == [a.token_ids for a in theirs], fields
        assert [a.text for a in mine] == [a.text for a in theirs]
        assert [(a.finish_reason, a.stop_reason) for a in mine] == [
            (a.finish_reason, a.stop_reason) for a in theirs
        ]
        for one, other in zip(mine, theirs, strict=True):
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=0.01)


@pytest.mark.int4
def test_what_the_beams_are_worth(pair: Pair) -> None:
    """The native engine, led along vLLM's beams, gives them the same scores; they come in the order of these."""
    fields = {"best_of": 3, "n": 3, "ignore_eos": True, "max_tokens": 8, "length_penalty": 0.0}
    (vllm,) = pair.vllm.generate([PLANE], search(fields), use_tqdm=False)
    scores = [answer.cumulative_logprob or 0.0 for answer in vllm.outputs]
    assert scores == sorted(scores, reverse=True)
    for answer, score in zip(vllm.outputs, scores, strict=True):
        led = {"prompt_token_ids": vllm.prompt_token_ids + answer.token_ids}
        led |= {"multi_modal_data": PLANE["multi_modal_data"]}
        read = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (native,) = pair.native.generate([led], read, use_tqdm=False)
        assert native.prompt_logprobs is not None
        steps = native.prompt_logprobs[len(vllm.prompt_token_ids) :]
        own = sum(s[t].logprob for t, s in zip(answer.token_ids, steps, strict=True) if s is not None)
        assert own == pytest.approx(score, abs=len(steps) * pair.checkpoint.tolerance)


def test_searches_beside_samples(pair: Pair) -> None:
    """A search gives the same beside other requests, of both kinds."""
    alone = pair.vllm.generate([PLANE], search({"best_of": 3, "n": 3}), use_tqdm=False)[0]
    params = [
        search({"best_of": 3, "n": 3}),
        SamplingParams(temperature=1.2, n=2, max_tokens=10, ignore_eos=True),
        search({"best_of": 2}),
    ]
    beside = pair.vllm.generate([PLANE, STARS, WORDS], params, use_tqdm=False)[0]
    assert [a.token_ids for a in beside.outputs] == [a.token_ids for a in alone.outputs]


def test_logprobs_of_beams(pair: Pair) -> None:
    ((native, vllm),) = pair.generate(
        [PLANE], search({"best_of": 2, "logprobs": 3, "prompt_logprobs": 1, "max_tokens": 8})
    )
    mine, theirs = native.outputs[0], vllm.outputs[0]
    assert mine.token_ids == theirs.token_ids
    assert mine.logprobs is not None
    assert theirs.logprobs is not None
    for one, other in zip(mine.logprobs, theirs.logprobs, strict=True):
        assert list(one) == list(other)
        assert [e.rank for e in one.values()] == [e.rank for e in other.values()]
        for token, entry in one.items():
            assert entry.logprob == pytest.approx(other[token].logprob, abs=1e-3)
    assert native.prompt_logprobs is not None
    assert vllm.prompt_logprobs is not None
    assert len(native.prompt_logprobs) == len(vllm.prompt_logprobs)


def test_the_call_of_todays_vllm(pair: Pair) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=12)
    native, vllm = (llm.beam_search([PLANE], params)[0] for llm in pair.both)
    assert [s.tokens for s in native.sequences] == [s.tokens for s in vllm.sequences]
    assert [s.answer for s in native.sequences] == [s.answer for s in vllm.sequences]
