"""OpenAI's request bodies as parameters, results as `chat.completion` objects."""

from __future__ import annotations

from typing import Any

import pytest

from huoyan.api.ask import ask_params
from huoyan.api.openai_format import chat_completion, error_body
from huoyan.api.openai_params import chat_options_from_body, sampling_from_body
from huoyan.api.outputs import CompletionOutput, Logprob, RequestOutput
from huoyan.errors import CapacityError, HuoyanError, InputError, UnsupportedError

DEFAULTS = {"temperature": 0.0, "max_tokens": 50}


def test_fields_are_taken_over() -> None:
    params = sampling_from_body(
        {
            "model": "x", "messages": [], "stream": True, "user": "me", "n": 2, "temperature": 0.5, "top_p": 0.9,
            "top_k": 7, "min_p": 0.1, "seed": 3, "stop": ["a"], "presence_penalty": 0.5, "frequency_penalty": 1,
            "repetition_penalty": 1.1, "max_tokens": 9, "logit_bias": {"12": -5}, "ignore_eos": True, "tools": [],
        },
        DEFAULTS,
    )  # fmt: skip
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (2, 0.5, 0.9, 7, 0.1)
    assert (params.seed, params.max_tokens, params.ignore_eos) == (3, 9, True)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, 1, 1.1)
    assert list(params.stop or ()) == ["a"]
    assert dict(params.logit_bias or {}) == {12: -5.0}


def test_what_is_left_out_comes_from_the_defaults() -> None:
    params = sampling_from_body({"temperature": None, "max_tokens": None}, DEFAULTS)
    assert (params.temperature, params.max_tokens, params.logprobs) == (0.0, 50, None)
    assert sampling_from_body({"max_completion_tokens": 7}, DEFAULTS).max_tokens == 7


def test_beams_need_no_temperature() -> None:
    for params in (
        sampling_from_body({"use_beam_search": True, "best_of": 3}, {"temperature": 0.7, "top_p": 0.8}),
        ask_params({"use_beam_search": True, "best_of": 3}),
    ):
        assert (params.use_beam_search, params.best_of, params.temperature, params.top_p) == (
            True,
            3,
            0.0,
            1.0,
        )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
    ],
)
def test_logprobs_are_two_fields_there(body: dict[str, Any], expected: int | None) -> None:
    assert sampling_from_body(body, DEFAULTS).logprobs == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}},
            {"json": {"type": "array"}},
        ),
        ({"guided_regex": "[a-z]+"}, {"regex": "[a-z]+"}),
        ({"structured_outputs": {"json": {"type": "string"}}}, {"json": {"type": "string"}}),
    ],
)
def test_structured_output_in_its_spellings(body: dict[str, Any], expected: Any) -> None:
    assert sampling_from_body(body, DEFAULTS).structured_outputs == expected


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"temprature": 1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
    ],
)
def test_mistakes_are_named(body: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        sampling_from_body(body, DEFAULTS)


def test_tools_are_refused() -> None:
    for body in (
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"reasoning_effort": "high"},
    ):
        with pytest.raises(UnsupportedError, match="not supported"):
            sampling_from_body(body, DEFAULTS)


def test_chat_options_are_picked_out() -> None:
    body = {"chat_template": "x", "add_generation_prompt": False, "mm_processor_kwargs": None, "n": 1}
    assert chat_options_from_body(body) == {"chat_template": "x", "add_generation_prompt": False}


def test_a_result_has_openais_shape() -> None:
    logprobs = [{5: Logprob(-0.1, 1, "a"), 6: Logprob(-2.0, 2, "b")}, {7: Logprob(-0.5, 1, None)}]
    answers = [
        CompletionOutput(0, "a?", [5, 7], -0.6, logprobs, "stop", 7),
        CompletionOutput(1, "b", [6], -2.0, None, "length", None),
    ]
    body = chat_completion(RequestOutput("r1", "p", [1, 2, 3], answers, True), "tiny", 1700000000)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    content = body["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == "a"
    assert content[0]["bytes"] == [97]
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["a", "b"]
    assert content[1]["token"] == "token_id:7"
    assert body["choices"][1]["logprobs"] is None


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (InputError("no"), "invalid_request_error", 400),
        (CapacityError("full"), "server_error", 503),
        (HuoyanError("gone"), "server_error", 500),
    ],
)
def test_an_error_has_openais_shape(error: HuoyanError, kind: str, code: int) -> None:
    body = error_body(error)["error"]
    assert (body["message"], body["type"], body["code"]) == (str(error), kind, code)
