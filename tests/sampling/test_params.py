"""SamplingParams: what is refused, what is normalised, other ways to make one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from huoyan.api.sampling_params import SamplingParams, SamplingType
from huoyan.errors import InputError, UnsupportedError

BEAM: dict[str, Any] = {"use_beam_search": True, "temperature": 0, "best_of": 3}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n=0"),
    ({"n": 1.5}, "n=1.5"),
    ({"n": True}, "n=True"),
    ({"n": 3, "best_of": 2}, "best_of=2"),
    ({"best_of": 0}, "best_of=0"),
    ({"presence_penalty": 2.1}, "presence_penalty=2.1"),
    ({"presence_penalty": -2.1}, "presence_penalty=-2.1"),
    ({"frequency_penalty": 3}, "frequency_penalty=3"),
    ({"frequency_penalty": -2.01}, "frequency_penalty=-2.01"),
    ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"repetition_penalty": 2.5}, "repetition_penalty=2.5"),
    ({"temperature": -0.1}, "temperature=-0.1"),
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"top_p": 0}, "top_p=0"),
    ({"top_p": 1.1}, "top_p=1.1"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_k": -2}, "top_k=-2"),
    ({"top_k": 5.0}, "top_k=5.0"),
    ({"min_p": -0.1}, "min_p=-0.1"),
    ({"min_p": 1.1}, "min_p=1.1"),
    ({"seed": 1 << 64}, "seed="),
    ({"seed": "x"}, "seed='x'"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"min_tokens": -1}, "min_tokens=-1"),
    ({"min_tokens": 17}, "min_tokens=17"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5"),
    ({"logprobs": -1}, "logprobs=-1"),
    ({"prompt_logprobs": -2}, "prompt_logprobs=-2"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a", 3]}, "stop="),
    ({"stop": 3}, "stop=3"),
    ({"stop": "a", "detokenize": False}, "detokenize"),
    ({"stop_token_ids": "12"}, "stop_token_ids"),
    ({"stop_token_ids": 12}, "stop_token_ids=12"),
    ({"stop_token_ids": [None]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [True]}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos=1"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {1: "b"}}, "logit_bias"),
    ({"logit_bias": {1: float("nan")}}, "logit_bias"),
    ({"logit_bias": {-1: 1}}, "logit_bias"),
    ({"early_stopping": True}, "early_stopping=True"),
    ({"early_stopping": "never"}, "early_stopping='never'"),
    ({"length_penalty": 0.5}, "length_penalty=0.5"),
    ({"temperature": 0, "best_of": 2}, "best_of=2"),
    ({"temperature": 0, "n": 2}, "n=2"),
    ({"use_beam_search": True}, "best_of=1"),
    ({"use_beam_search": "yes"}, "use_beam_search='yes'"),
    ({**BEAM, "temperature": 1.0}, "temperature=1"),
    ({**BEAM, "best_of": 1}, "best_of=1"),
    ({**BEAM, "n": 4}, "best_of=3"),
    ({**BEAM, "top_p": 0.9}, "top_p=0.9"),
    ({**BEAM, "top_k": 5}, "top_k=5"),
    ({**BEAM, "early_stopping": "always"}, "early_stopping='always'"),
    ({**BEAM, "early_stopping": 1}, "early_stopping=1"),
    ({**BEAM, "length_penalty": 100}, "length_penalty=100"),
    ({**BEAM, "length_penalty": None}, "length_penalty=None"),
    ({"structured_outputs": "json"}, "structured_outputs"),
    ({"structured_outputs": {}}, "nothing"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"jsn": {}}}, "structured_outputs"),
    ({"structured_outputs": {"json": 3}}, "schema"),
    ({"structured_outputs": {"json": False}}, "False"),
    ({"structured_outputs": {"json_object": False}}, "json_object"),
    ({"structured_outputs": {"regex": 3}}, "regex"),
    ({"structured_outputs": {"choice": []}}, "choice"),
    ({"structured_outputs": {"choice": "ab"}}, "choice"),
]


@pytest.mark.parametrize(
    ("values", "says"), REFUSED, ids=[f"{i}-{says}" for i, (_, says) in enumerate(REFUSED)]
)
def test_refused_in_one_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**values)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert len(message) > len(says) + 8, "the line must say what is allowed too"


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"n": 3, "best_of": 5},
    {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1},
    {"repetition_penalty": 2.0, "presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"max_tokens": None, "min_tokens": 10**6},
    {"min_tokens": 16},
    {"logprobs": 0, "prompt_logprobs": 0},
    {"stop": ["a", "b"], "include_stop_str_in_output": True},
    {"seed": 2**64 - 1},
    {"seed": -5},
    BEAM,
    {**BEAM, "n": 3, "early_stopping": "never", "length_penalty": -1.0},
    {"use_beam_search": True, "temperature": 0, "n": 2},
    {**BEAM, "early_stopping": True, "repetition_penalty": 1.1, "min_p": 0.1},
    {"structured_outputs": {"json": {"type": "object"}}},
    {"structured_outputs": {"json": '{"type": "object"}', "regex": None}},
]


@pytest.mark.parametrize("values", ACCEPTED, ids=range(len(ACCEPTED)))
def test_accepted_copied_and_read_back(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert params.clone() == params
    assert copy.deepcopy(params) == params
    assert pickle.loads(pickle.dumps(params)) == params
    assert SamplingParams.from_dict(params.to_dict()) == params


def test_normalised() -> None:
    params = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        stop="x",
        stop_token_ids=(5, 7, 5),
        seed=-1,
        logprobs=True,
        logit_bias={"3": 1000, np.int64(4): -float("inf")},
    )
    assert (params.n, params.best_of, params.num_sequences) == (2, 2, 2)
    assert type(params.n) is int
    assert type(params.temperature) is float
    assert params.stop == ["x"]
    assert params.stop_strings == ("x",)
    assert params.stop_token_ids == [5, 7]
    assert params.seed is None
    assert params.logprobs == 1
    assert params.logit_bias == {3: 100.0, 4: -100.0}


def test_greedy_drops_filters() -> None:
    params = SamplingParams(temperature=1e-6, top_p=0.5, top_k=3, min_p=0.1)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, -1, 0.0)


def test_sampling_type() -> None:
    assert SamplingParams().sampling_type is SamplingType.RANDOM
    assert SamplingParams(seed=0).sampling_type is SamplingType.RANDOM_SEED
    assert SamplingParams(temperature=0).sampling_type is SamplingType.GREEDY
    assert SamplingParams(**BEAM).sampling_type is SamplingType.BEAM


def test_all_stop_token_ids_hold_the_checkpoints_even_where_eos_is_ignored() -> None:
    params = SamplingParams(stop_token_ids=[5], ignore_eos=True)
    assert params.all_stop_token_ids(2, (2, 3)) == {2, 3, 5}
    assert params.all_stop_token_ids() == {5}


def test_unknown_name_has_a_hint() -> None:
    with pytest.raises(InputError, match="did you mean temperature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="did you mean max_tokens"):
        SamplingParams(max_new_tokens=5)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="did you mean top_p"):
        SamplingParams.from_dict({"topp": 1})
    with pytest.raises(InputError, match="there are n, best_of"):
        SamplingParams.from_dict({"zzzzzz": 1})
    with pytest.raises(UnsupportedError, match="logit_bias"):
        SamplingParams(logits_processors=[print])  # type: ignore[call-arg]
    with pytest.raises(InputError, match="did you mean"):
        SamplingParams().clone(temprature=0.5)


def test_from_dict() -> None:
    params = SamplingParams.from_dict(
        {
            "max_completion_tokens": 7,
            "guided_json": {"type": "object"},
            "guided_regex": None,
            "temperature": None,
            "logits_processors": None,
        }
    )
    assert params.max_tokens == 7
    assert params.structured_outputs == {"json": {"type": "object"}}
    assert params.temperature == 1.0
    assert SamplingParams.from_dict({"max_tokens": None}).max_tokens is None
    with pytest.raises(InputError, match="again"):
        SamplingParams.from_dict({"max_tokens": 5, "max_new_tokens": 6})
    with pytest.raises(InputError, match="names with values"):
        SamplingParams.from_dict([("n", 1)])  # type: ignore[arg-type]


def test_defaults_of_a_checkpoint() -> None:
    defaults = {"temperature": 0.7, "top_p": 0.8, "top_k": 0, "repetition_penalty": 1.05, "max_tokens": None}
    params = SamplingParams.from_dict({"temperature": 0.2}, defaults)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.2, 0.8, -1, 1.05)
    assert params.max_tokens == 16
    beams = SamplingParams.from_dict(BEAM, defaults)
    assert (beams.top_p, beams.temperature, beams.repetition_penalty) == (1.0, 0.0, 1.05)


def test_clone_is_independent_and_checked() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1], logit_bias={1: 1.0})
    twin = params.clone(n=3)
    assert (twin.n, twin.best_of) == (3, 3)
    assert isinstance(twin.stop, list)
    assert isinstance(twin.logit_bias, dict)
    twin.stop.append("b")
    twin.logit_bias[2] = 1.0
    assert params.stop == ["a"]
    assert params.logit_bias == {1: 1.0}
    assert SamplingParams(best_of=4).clone(n=2).best_of == 4
    with pytest.raises(InputError, match="best_of=4"):
        SamplingParams(best_of=4).clone(n=5)


def test_vocabulary() -> None:
    SamplingParams(logit_bias={9: 1}, stop_token_ids=[9], logprobs=10).check_vocabulary(10)
    for values, says in (
        ({"logit_bias": {10: 1}}, "logit_bias"),
        ({"stop_token_ids": [3, 10]}, "stop_token_ids"),
        ({"prompt_logprobs": 11}, "prompt_logprobs=11"),
    ):
        with pytest.raises(InputError, match=says):
            SamplingParams(**values).check_vocabulary(10)  # type: ignore[arg-type]
