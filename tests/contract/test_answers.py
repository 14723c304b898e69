"""Greedy answers: the same token ids up to a tie, the same text, ends and log-probabilities."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from huoyan import SamplingParams
from tests.contract.compare import TOP, outputs_agree, values_agree
from tests.contract.conftest import MEDIA, Pair, drawn, picture

PLACE = "(<image>./</image>)"
QUESTIONS = (
    "What is in this picture?",
    "请描述这张图片",
    "What colour is the background?",
    "How many stars are there?",
)


def turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def prompts(rng: random.Random) -> list[dict[str, Any]]:
    """Words alone, one picture, several, odd sizes, a slice limit, a video, token ids."""
    question = rng.choice(QUESTIONS)
    several = [drawn(rng, 600) for _ in range(rng.randint(2, 3))]
    limited = {
        "images": [drawn(rng)],
        "max_slice_nums": rng.randint(1, 9),
        "use_image_id": rng.random() < 0.5,
    }
    return [
        {"prompt": turn("你好！")},
        {"prompt": turn(f"{PLACE}\n{question}"), "multi_modal_data": {"image": picture(rng)}},
        {"prompt": turn(f"{PLACE}\n{question}"), "multi_modal_data": {"image": drawn(rng)}},
        {"prompt": turn(PLACE * len(several) + question), "multi_modal_data": {"image": several}},
        {"prompt": turn(f"{PLACE}\n{question}"), "multi_modal_data": {"image": limited}},
        {
            "prompt": turn("(<video>./</video>)\nPlease describe this video."),
            "multi_modal_data": {"video": str(MEDIA / "car.mp4")},
            "mm_processor_kwargs": {"max_frames": rng.randint(2, 6), "max_slice_nums": 1},
        },
        {"prompt_token_ids": [rng.randrange(3, 900) for _ in range(rng.randint(1, 300))]},
    ]


def familiar(rng: random.Random) -> list[dict[str, Any]]:
    """Questions the model was trained for. On noise it is undecided, and 16 bits and 32 go far apart."""
    video = prompts(rng)[5]
    several = [picture(rng), picture(rng)]
    questions = [turn(f"{PLACE}\n{question}") for question in QUESTIONS[:3]]
    return [
        *({"prompt": q, "multi_modal_data": {"image": picture(rng)}} for q in questions),
        {"prompt": turn(PLACE * 2 + "\nWhat changed between the two pictures?"),
         "multi_modal_data": {"image": several}},
        video,
    ]  # fmt: skip


@pytest.mark.int4
def test_greedy_answers(pair: Pair, rng: random.Random, report: list[str]) -> None:
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=TOP)
    checkpoint = pair.checkpoint
    worst = max(
        outputs_agree(native, vllm, checkpoint.tolerance)
        for native, vllm in pair.generate((familiar if checkpoint.sixteen_bits else prompts)(rng), params)
    )
    report.append(f"{checkpoint.name}: log-probabilities of greedy answers differ by at most {worst:.1e}")


def test_prompts_are_read_alike(pair: Pair, rng: random.Random, report: list[str]) -> None:
    """Behind each token of a prompt, its pictures among them, both see the same: the pixels are the same."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3)
    worst = 0.0
    for native, vllm in pair.generate(prompts(rng), params):
        assert native.prompt_logprobs is not None
        assert vllm.prompt_logprobs is not None
        assert len(native.prompt_logprobs) == len(vllm.prompt_logprobs) == len(native.prompt_token_ids)
        assert native.prompt_logprobs[0] is vllm.prompt_logprobs[0] is None
        for token, mine, theirs in zip(
            native.prompt_token_ids[1:], native.prompt_logprobs[1:], vllm.prompt_logprobs[1:], strict=True
        ):
            assert mine is not None
            assert theirs is not None
            assert token in mine
            assert token in theirs
            own = {token: mine[token]}, {token: theirs[token]}
            worst = max(worst, values_agree(*own, pair.checkpoint.tolerance))
    report.append(f"tiny: log-probabilities of prompts differ by at most {worst:.1e}")


def test_conversations(pair: Pair, rng: random.Random) -> None:
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=TOP)
    forged = f"{rng.choice(QUESTIONS)} (<image>./</image>)<|im_end|>"
    conversation = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture(rng)},
                {"type": "image", "image": drawn(rng, 500)},
                {"type": "text", "text": forged},
            ],
        },
    ]
    native, vllm = (llm.chat(conversation, params, use_tqdm=False)[0] for llm in pair.both)
    outputs_agree(native, vllm, pair.checkpoint.tolerance)


ENDS: tuple[dict[str, Any], ...] = (
    {"stop": ["plane", "a", "星"]},
    {"stop": ["the", "。", "飞"], "include_stop_str_in_output": True},
    {"stop": ["e"], "min_tokens": 6},
    {"stop_token_ids": [263, 540, 508, 777]},
    {"stop_token_ids": [263, 540], "include_stop_str_in_output": True},
    {"min_tokens": 14},
    {"ignore_eos": True},
    {"ignore_eos": True, "skip_special_tokens": False},
    {"ignore_eos": True, "min_tokens": 12},
    {"max_tokens": 1},
    {"detokenize": False},
    {"skip_special_tokens": False},
    {"spaces_between_special_tokens": False, "skip_special_tokens": False, "ignore_eos": True},
)


def test_ends_and_text(pair: Pair, rng: random.Random) -> None:
    """Stop strings, stop tokens, least and most tokens: where, why and with which text an answer ends."""
    image = picture(rng)
    text = turn(f"{PLACE}\n{rng.choice(QUESTIONS)}")
    prompt = {"prompt": text, "multi_modal_data": {"image": image}}
    params = [SamplingParams(**{"temperature": 0, "max_tokens": 20, "logprobs": TOP, **end}) for end in ENDS]
    for native, vllm in pair.generate([prompt] * len(params), params):
        outputs_agree(native, vllm, pair.checkpoint.tolerance)


def test_what_is_reported(pair: Pair, rng: random.Random) -> None:
    """Fields are there exactly where they were asked for. vLLM is not asked for what nobody wants to know."""
    prompt = {"prompt": turn(f"{PLACE}\nwhat?"), "multi_modal_data": {"image": picture(rng)}}
    for count in (None, 0, 3, 40):
        params = SamplingParams(temperature=0, max_tokens=3, logprobs=count, prompt_logprobs=count)
        ((native, vllm),) = pair.generate([prompt], params)
        mine, theirs = native.outputs[0], vllm.outputs[0]
        if count is None:
            assert (mine.logprobs, theirs.logprobs) == (None, None)
            assert (native.prompt_logprobs, vllm.prompt_logprobs) == (None, None)
            assert mine.cumulative_logprob is not None
            assert theirs.cumulative_logprob is None
            continue
        outputs_agree(native, vllm, pair.checkpoint.tolerance)
        assert theirs.cumulative_logprob == pytest.approx(mine.cumulative_logprob, abs=0.01)
        assert theirs.logprobs is not None
        for token, step in zip(theirs.token_ids, theirs.logprobs, strict=True):
            assert max(count, 1) <= len(step) <= count + 1
            assert step[token].rank == 1
    for output in (native, vllm):
        assert output.metrics is not None
        assert output.metrics.first_token_time is not None
        assert output.metrics.finished_time is not None
        assert output.metrics.arrival_time <= output.metrics.first_token_time <= output.metrics.finished_time


def test_structured_outputs(pair: Pair, rng: random.Random) -> None:
    """The same grammars through the same library: the same text. The token that ends it may be another one."""
    prompt = {"prompt": turn(f"{PLACE}\nwhat?"), "multi_modal_data": {"image": picture(rng)}}
    schema = {
        "type": "object",
        "properties": {"sky": {"enum": ["blue", "red"]}, "count": {"type": "integer"}},
        "required": ["sky", "count"],
        "additionalProperties": False,
    }
    lark = 'start: ("a" | "b")~3 " ok"'
    wanted = (
        {"choice": ["yes", "no", "perhaps"]},
        {"regex": "[a-c]{2,4} (cat|dog)"},
        {"json": schema},
        {"grammar": lark},
    )
    params = [SamplingParams(temperature=0, max_tokens=40, structured_outputs=w) for w in wanted]
    for native, vllm in pair.generate([prompt] * len(params), params):
        assert native.error is None
        assert vllm.error is None
        assert native.outputs[0].text == vllm.outputs[0].text
        assert native.outputs[0].finish_reason == vllm.outputs[0].finish_reason


def test_requests_do_not_change_each_other(pair: Pair, rng: random.Random) -> None:
    """More requests than run at once, long and short, give what each gives alone."""
    params = SamplingParams(temperature=0, max_tokens=10, logprobs=TOP)
    asked = [prompt for _ in range(2) for prompt in prompts(rng)]
    together = pair.vllm.generate(asked, params, use_tqdm=False)
    for prompt, output in rng.sample(list(zip(asked, together, strict=True)), 3):
        (alone,) = pair.vllm.generate([prompt], params, use_tqdm=False)
        outputs_agree(alone, output, pair.checkpoint.tolerance)


def test_streams_grow(pair: Pair, rng: random.Random) -> None:
    """Each output of a stream holds what the one before held."""
    content = [
        {"type": "image", "image": picture(rng)},
        {"type": "text", "text": rng.choice(QUESTIONS)},
    ]
    conversation = [{"role": "user", "content": content}]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=TOP)
    streams = [list(llm.stream(conversation, params)) for llm in pair.both]
    for stream in streams:
        texts = [output.outputs[0].text for output in stream]
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        assert [output.finished for output in stream] == [False] * (len(stream) - 1) + [True]
        assert len(stream) > 3
    native, vllm = (stream[-1] for stream in streams)
    outputs_agree(native, vllm, pair.checkpoint.tolerance)
