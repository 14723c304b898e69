"""What the sampler keeps per sequence, through the engine: forks, beams, preemption, and other requests beside."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch

from huoyan.api.outputs import RequestOutput
from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.request import EngineRequest
from huoyan.models.minicpmv import MiniCPMV
from huoyan.prompt.tokenizer import Tokenizer
from tests.engine.harness import drive
from tests.engine.support import VOCAB, plain_logits, request, tiny_model, words
from tests.prompt.checkpoint import train, write_folder
from tests.sampling.test_sampler import plain_process
from tests.sampling.test_structured import SCHEMA

EOS = 4
SMALL = EngineConfig(num_blocks=26, block_size=4, max_num_seqs=12, max_num_batched_tokens=24)


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return tiny_model(31)


def random_params(rng: random.Random, kind: str) -> SamplingParams:
    changes = {
        "repetition_penalty": rng.choice([1.0, 1.2, 0.9]),
        "presence_penalty": rng.choice([0.0, 1.5]),
        "frequency_penalty": rng.choice([0.0, 0.8, -0.5]),
        "logit_bias": rng.choice([None, {7: 3.0, 8: -100.0}]),
        "min_tokens": rng.choice([0, 3]),
        "max_tokens": 9,
        "stop_token_ids": [11, 12],
    }
    if kind == "greedy":
        return SamplingParams(temperature=0, **changes)
    if kind == "beams":
        return SamplingParams(temperature=0, use_beam_search=True, best_of=3, n=2, **changes)
    return SamplingParams(
        temperature=1.0, n=3, seed=rng.randrange(99), top_p=rng.choice([1.0, 0.9]), logprobs=1, **changes
    )


def processed(model: MiniCPMV, req: EngineRequest, answer: list[int]) -> list[float]:
    logits = plain_logits(model, req, answer)[-1].tolist()
    return plain_process(logits, req.params, req.prompt.token_ids, answer, {11, 12, EOS})


def test_every_kind_together_as_each_alone(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    kinds = ["greedy", "sampled", "beams"] * 4
    requests = [
        request(f"{kind}{i}", words(rng, rng.randint(1, 14)), random_params(rng, kind))
        for i, kind in enumerate(kinds)
    ]
    together = drive(Engine(model, SMALL, eos_token_id=EOS), requests, rng)
    for req in requests:
        roomy = Engine(model, EngineConfig(num_blocks=200, block_size=4), eos_token_id=EOS)
        alone = drive(roomy, [req])[req.request_id]
        got = together[req.request_id]
        assert alone.error is None
        if got.error is not None:
            assert "block" in got.error or "memory" in got.error
            continue
        if not got.warnings:
            assert [o.token_ids for o in got.outputs] == [o.token_ids for o in alone.outputs], req.request_id
        hold(model, req, got)


def hold(model: MiniCPMV, req: EngineRequest, output: RequestOutput) -> None:
    """Recompute what each token was chosen from."""
    for answer in output.outputs:
        total = 0.0
        for i, token in enumerate(answer.token_ids):
            logits = processed(model, req, answer.token_ids[:i])
            if req.params.use_beam_search:
                total += float(torch.tensor(logits).log_softmax(-1)[token])
                continue
            raw = plain_logits(model, req, answer.token_ids[:i])[-1]
            total += float(raw.log_softmax(-1)[token])
            if req.params.temperature == 0:
                assert logits[token] == pytest.approx(max(logits), abs=1e-4)
        assert answer.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_the_best_of_several_samples_are_shown(model: MiniCPMV) -> None:
    def ask(n: int) -> RequestOutput:
        params = SamplingParams(n=n, best_of=5, seed=3, max_tokens=6, ignore_eos=True)
        engine = Engine(model, EngineConfig(num_blocks=200, block_size=4))
        return drive(engine, [request("r", [7, 8, 9], params)])["r"]

    everything = ask(5)
    values = [o.cumulative_logprob for o in everything.outputs]
    assert len({tuple(o.token_ids) for o in everything.outputs}) > 1
    best = sorted((v for v in values if v is not None), reverse=True)[:2]
    assert [o.cumulative_logprob for o in ask(2).outputs] == pytest.approx(best)


def test_structured_answers_of_every_kind(tmp_path: Path, seed: int) -> None:
    """Samples fork their place in the grammar, beams too; all answers match."""
    pytest.importorskip("llguidance")
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, train()))
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    model = tiny_model(5, vocab_size=tokenizer.vocab_size + 3)
    engine = Engine(model, EngineConfig(num_blocks=200, block_size=8), eos_token_id=end, tokenizer=tokenizer)
    rng = random.Random(seed)
    pattern = "(red|blue|green) [a-c]{1,3}(, [a-c]{1,3}){0,2}"
    kinds = {
        "greedy": SamplingParams(temperature=0, max_tokens=80),
        "sampled": SamplingParams(n=3, seed=1, max_tokens=80),
        "beams": SamplingParams(temperature=0, use_beam_search=True, best_of=4, n=2, max_tokens=80),
        "held": SamplingParams(n=2, seed=2, max_tokens=80, min_tokens=70),
    }
    requests = []
    for kind, params in kinds.items():
        for form in ({"regex": pattern}, {"json": SCHEMA}):
            ids = [rng.randrange(200) for _ in range(rng.randint(1, 9))]
            name = f"{kind} {next(iter(form))}"
            requests.append(request(name, ids, params.clone(structured_outputs=form)))
    outputs = drive(engine, requests, rng)
    for req in requests:
        output = outputs[req.request_id]
        assert output.error is None
        assert len(output.outputs) == req.params.n
        for answer in output.outputs:
            if answer.finish_reason == "length":
                # A JSON object may hold white space without end.
                assert "json" in req.request_id
                continue
            if "regex" in req.request_id:
                assert re.fullmatch(pattern, answer.text)
            else:
                assert set(json.loads(answer.text)) == {"name", "count"}
    assert sum(a.finish_reason == "stop" for o in outputs.values() for a in o.outputs) >= 8


def test_wrong_parameters_are_refused_when_they_come(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(num_blocks=50, block_size=4))
    for changes in (
        {"logit_bias": {VOCAB: 1.0}},
        {"stop_token_ids": [VOCAB]},
        {"logprobs": VOCAB + 1},
        {"structured_outputs": {"regex": "a"}},
    ):
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            engine.add_request(request("r", [7], SamplingParams(**changes)))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert not engine.has_unfinished_requests()
