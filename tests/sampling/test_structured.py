"""Whatever the logits say, a structured answer matches."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance")

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.sampler import SamplingRow, sample
from huoyan.engine.structured import GrammarCompiler, GrammarState
from huoyan.errors import InputError
from huoyan.prompt.tokenizer import Tokenizer
from tests.prompt.checkpoint import train, write_folder

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.from_folder(write_folder(folder, train()))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({end}))


def babble(state: GrammarState, tokenizer: Tokenizer, seed: int, most: int = 400) -> str:
    """Follow random logits within the grammar until the end token."""
    g = torch.Generator().manual_seed(seed)
    end = tokenizer.token_to_id("<|im_end|>")
    ids: list[int] = []
    for _ in range(most):
        state.update(ids)
        allowed = state.allowed(torch.device("cpu"))
        assert allowed.any()
        logits = torch.randn(tokenizer.vocab_size, generator=g).masked_fill(~allowed, float("-inf"))
        token = int(logits.argmax())
        if token == end:
            return tokenizer.decode(ids)
        ids.append(token)
    raise AssertionError("the grammar did not end")


@pytest.mark.parametrize("case", range(4))
def test_json(compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int, case: int) -> None:
    value = json.loads(babble(compiler.compile({"json": SCHEMA}), tokenizer, seed + case))
    assert set(value) == {"name", "count"}
    assert isinstance(value["name"], str)
    assert 0 <= value["count"] <= 99


def test_regex_and_choice(compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int) -> None:
    pattern = r"(红|蓝)色[0-9]{2,4}"
    assert re.fullmatch(pattern, babble(compiler.compile({"regex": pattern}), tokenizer, seed))
    options = ["yes", "no", '"maybe"', "不知道"]
    assert babble(compiler.compile({"choice": options}), tokenizer, seed) in options


@pytest.mark.parametrize("option", ['a"b', "a\\b", "a\nb", "{x}|y*", "é\x7f%", "/^$.+?[(", "不知道 🙂"])
def test_choices_are_literal(compiler: GrammarCompiler, tokenizer: Tokenizer, option: str) -> None:
    assert babble(compiler.compile({"choice": [option]}), tokenizer, 0) == option


def test_any_json_object(compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int) -> None:
    state = compiler.compile({"json_object": True})
    ids = tokenizer.encode_plain('{"a": [1, {"b": null}]}')
    state.update(ids)
    assert [int(i) for i in state.allowed(torch.device("cpu")).nonzero()] == [
        tokenizer.token_to_id("<|im_end|>")
    ]
    # Also after the stop token was taken.
    state.update([*ids, tokenizer.token_to_id("<|im_end|>")])
    assert [int(i) for i in state.allowed(torch.device("cpu")).nonzero()] == [
        tokenizer.token_to_id("<|im_end|>")
    ]


def test_the_same_grammar_again_starts_anew(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    cpu = torch.device("cpu")
    first = compiler.compile({"json": SCHEMA})
    fresh = first.allowed(cpu)
    first.update(tokenizer.encode_plain('{"name"'))
    again = compiler.compile({"json": dict(reversed(SCHEMA.items()))})
    assert torch.equal(again.allowed(cpu), fresh)
    assert not torch.equal(first.allowed(cpu), fresh)
    text = compiler.compile({"json": json.dumps(SCHEMA)})
    assert torch.equal(text.allowed(cpu), fresh)


def test_min_tokens_yields_to_a_grammar_at_its_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    state = compiler.compile({"choice": ["ab"]})
    ids = tokenizer.encode_plain("ab")
    state.update(ids)
    logits = torch.randn(2, tokenizer.vocab_size, generator=torch.Generator().manual_seed(1))
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, min_tokens=9)
        allowed = state.allowed(torch.device("cpu"))
        guided = SamplingRow(params, len(ids), frozenset({end}), allowed=allowed)
        free = SamplingRow(params, len(ids), frozenset({end}))
        found = sample(logits, [free, guided]).read()
        assert found[1].token_id == end
        assert found[1].logprob == pytest.approx(float(logits[1].log_softmax(-1)[end]), abs=1e-5)
        assert found[0].token_id != end


def test_forks_part(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    state = compiler.compile({"choice": ["ab", "ac"]})
    first = tokenizer.encode_plain("a")
    state.update(first)
    twin = state.fork()
    twin.update([*first, *tokenizer.encode_plain("b")])
    before = state.allowed(torch.device("cpu"))
    twin.update([*first, *tokenizer.encode_plain("b"), 0])
    assert torch.equal(state.allowed(torch.device("cpu")), before)
    assert not torch.equal(state.allowed(torch.device("cpu")), twin.allowed(torch.device("cpu")))


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": '{"type": "nonsense"}'},
        {"json": '{"type":'},
        {"json": '["array"]'},
        {"json": {"enum": {1, 2}}},
        {"json": {"$ref": "http://nowhere.example/schema"}},
        {"regex": "(unclosed"},
        {"grammar": "start: undefined_rule"},
    ],
)
def test_wrong_grammars_are_one_line(compiler: GrammarCompiler, wanted: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        compiler.compile(wanted)
    assert "\n" not in str(caught.value)
    assert next(iter(wanted)) in str(caught.value)
