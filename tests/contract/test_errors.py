"""What is wrong with a request is found on both, told in the same words where it is the same, and harms no other."""

from __future__ import annotations

import random
from typing import Any

import pytest

from huoyan import LLM, SamplingParams
from huoyan.errors import HuoyanError
from tests.contract.compare import TOP, outputs_agree
from tests.contract.conftest import MAX_MODEL_LEN, Pair, picture
from tests.contract.test_answers import PLACE, turn

GREEDY = {"temperature": 0, "max_tokens": 6}
PROMPT = {"prompt": turn("你好！")}

WRONG: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"prompt_token_ids": [7] * MAX_MODEL_LEN}, {}),
    ({"prompt_token_ids": [5, 100_000]}, {}),
    ({"prompt": turn(PLACE)}, {}),
    (PROMPT, {"logit_bias": {50_000: 1.0}}),
    (PROMPT, {"stop_token_ids": [50_000]}),
    (PROMPT, {"logprobs": 50_000}),
    (PROMPT, {"n": 200, "temperature": 1.0}),
    (PROMPT, {"structured_outputs": {"grammar": "start: ("}}),
    ({**PROMPT, "multi_modal_data": {"image": "no/such/picture.png"}}, {}),
)


def refusal(llm: LLM, prompt: Any, params: dict[str, Any]) -> HuoyanError:
    with pytest.raises(HuoyanError) as caught:
        llm.generate(prompt, SamplingParams(**{**GREEDY, **params}), use_tqdm=False)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_the_same_words(pair: Pair, case: int) -> None:
    native, vllm = (refusal(llm, *WRONG[case]) for llm in pair.both)
    assert type(native) is type(vllm)
    assert str(native) == str(vllm)


def test_what_vllm_alone_refuses(pair: Pair) -> None:
    for params, words in (
        ({"temperature": 2.5}, "at most 2"),
        ({"use_beam_search": True, "best_of": 2, "repetition_penalty": 1.2}, "engine='native'"),
    ):
        assert words in str(refusal(pair.vllm, PROMPT, params))
        pair.native.generate(PROMPT, SamplingParams(**{**GREEDY, **params}), use_tqdm=False)


def test_wrong_ones_beside_good_ones(pair: Pair, rng: random.Random) -> None:
    """In a list, a wrong request becomes an output with its error, and the others are answered as ever."""
    good = {"prompt": turn(f"{PLACE}\nwhat?"), "multi_modal_data": {"image": picture(rng)}}
    asked: list[Any] = [good, *(prompt for prompt, _ in WRONG), good, PROMPT]
    greedy = SamplingParams(**GREEDY, logprobs=TOP)
    params = [greedy, *(SamplingParams(**{**GREEDY, **p}) for _, p in WRONG), greedy, greedy]
    for i, (native, vllm) in enumerate(pair.generate(asked, params)):
        if 0 < i <= len(WRONG):
            assert native.error == vllm.error
            assert native.error
            assert (vllm.outputs, vllm.finished) == ([], True)
        else:
            outputs_agree(native, vllm, pair.checkpoint.tolerance)


def test_options_of_vllm(pair: Pair) -> None:
    """A context longer than the checkpoint's, options that this version has not, a device it does not run on."""
    for options, words in (
        ({"device": "cuda:1"}, "runs on cpu"),
        ({"quantization": "no-such-method"}, "vLLM refuses to load tiny"),
        ({"calculate_kv_scales": True}, "has no option"),
    ):
        with pytest.raises(HuoyanError, match=words) as caught:
            LLM("tiny", engine="vllm", **options)
        assert "\n" not in str(caught.value)
