"""Steps launched before the tokens of the one before are known: the same answers, with one step fewer to wait for."""

from __future__ import annotations

import dataclasses
import random

import pytest

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.request import EngineRequest
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.harness import drive
from tests.engine.support import VOCAB, greedy, picture, plain_greedy, request, tiny_model, words

CONFIG = EngineConfig(num_blocks=40, block_size=4, max_num_seqs=6, max_num_batched_tokens=24)
AHEAD = dataclasses.replace(CONFIG, run_ahead=True)


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return tiny_model(47)


def random_request(rng: random.Random, name: str) -> EngineRequest:
    """Of every kind: those that can be run ahead of, and those that the host must see first."""
    kind = rng.choice(["greedy", "sampled", "sampled", "penalised", "penalised", "several", "beams"])
    penalised = kind == "penalised"
    params = SamplingParams(
        temperature=0.0 if kind in ("greedy", "beams") else rng.choice([0.0, 0.8, 1.5]) if penalised else 1.2,
        seed=rng.randrange(99),
        max_tokens=rng.choice([1, 2, 7, 15]),
        min_tokens=rng.choice([0, 0, 1]),
        stop_token_ids=rng.sample(range(VOCAB), rng.choice([0, 3])),
        repetition_penalty=rng.choice([1.1, 0.8, 2.0]) if penalised else 1.0,
        frequency_penalty=rng.choice([0.0, 1.0, -2.0]) if penalised else 0.0,
        presence_penalty=rng.choice([0.0, 1.0]) if penalised else 0.0,
        logprobs=rng.choice([None, 0, 3]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        top_p=0.9 if kind == "sampled" else 1.0,
        n=2 if kind in ("several", "beams") else 1,
        use_beam_search=kind == "beams",
    )
    parts = [*words(rng, rng.randint(1, 12)), *([picture(rng)] if rng.random() < 0.3 else [])]
    return request(name, parts, params)


def test_nothing_else_comes_of_it(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        requests = [random_request(rng, f"r{i}") for i in range(rng.randint(1, 8))]
        outputs = [drive(Engine(model, config), requests) for config in (CONFIG, AHEAD)]
        for req in requests:
            want, got = (found[req.request_id] for found in outputs)
            assert (got.error, got.finished) == (want.error, True)
            for a, b in zip(want.outputs, got.outputs, strict=True):
                assert a.token_ids == b.token_ids
                assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
                assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-4)
                assert [list(step) for step in a.logprobs or ()] == [list(step) for step in b.logprobs or ()]


def test_a_step_is_launched_before_the_one_before_it_is_seen(model: MiniCPMV) -> None:
    engine = Engine(model, AHEAD)
    engine.add_request(request("r", [5, 6, 7], greedy(4)))
    launched = []
    forward = engine.runner.forward

    def noted(schedule, before=None):  # type: ignore[no-untyped-def]
        launched.append([len(c.sequence.output_ids) for c in schedule.chunks])
        return forward(schedule, before)

    engine.runner.forward = noted  # type: ignore[method-assign]
    seen = [[len(o.outputs[0].token_ids) for o in engine.step()] for _ in range(5)]
    assert seen == [[], [1], [2], [3], [4]]
    # The last step is not launched: the fourth token ends the answer by its length, which is known before.
    assert launched == [[0], [0], [1], [2]]
    assert not engine.has_unfinished_requests()


def test_who_leaves_while_a_step_is_under_way_leaves_nothing_behind(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(model, AHEAD)
    stays = request("stays", words(rng, 6), greedy(12))
    for req in (request("leaves", words(rng, 9), greedy(30)), stays):
        engine.add_request(req)
    for _ in range(rng.randint(1, 6)):
        engine.step()
    engine.abort_request("leaves")
    last = {}
    while engine.has_unfinished_requests():
        last |= {o.request_id: o for o in engine.step()}
        engine.scheduler.check()
    assert last["leaves"].outputs[0].finish_reason == "abort"
    assert last["stays"].outputs[0].token_ids == plain_greedy(model, stays, 12)[0]
    assert not engine.scheduler.running
    assert engine.pool.num_free == engine.pool.num_blocks
