"""Whatever happens around it, a request ends as if it had run alone."""

from __future__ import annotations

import random

import pytest

from huoyan.api.outputs import RequestOutput
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.request import EngineRequest
from huoyan.media.types import PreparedPicture
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.harness import TopFirst, drive, small_config
from tests.engine.support import VOCAB, greedy, picture, plain_greedy, request, tiny_model, words

TIE = 1e-4
"""Logits this close may swap when the same numbers are added in another order."""


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return tiny_model(20_26)


def random_requests(rng: random.Random, count: int, widest: int = 1) -> list[EngineRequest]:
    """Prompts that share beginnings and pictures, or nothing."""
    openings = [words(rng, rng.randint(1, 20)) for _ in range(2)]
    pictures = [picture(rng, rng.randint(1, 4)) for _ in range(3)]
    requests = []
    for i in range(count):
        parts: list[int | PreparedPicture] = []
        if rng.random() < 0.6:
            parts += rng.choice(openings)
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            parts += words(rng, rng.randint(0, 3))
            parts.append(rng.choice(pictures) if rng.random() < 0.7 else picture(rng, rng.randint(1, 3)))
        parts += words(rng, rng.randint(0 if parts else 1, 15))
        stops = rng.sample(range(VOCAB), rng.choice([0, 0, 4]))
        params = greedy(
            rng.choice([1, 2, 5, 9, 17]), stop_token_ids=stops, n=rng.randint(1, widest), min_tokens=0
        )
        requests.append(request(f"r{i}", parts, params))
    return requests


def assert_as_alone(
    model: MiniCPMV, requests: list[EngineRequest], outputs: dict[str, RequestOutput], engine: Engine
) -> None:
    """Compare with the plain model, each answer with what follows its own first token."""
    limit = engine.size.max_model_len
    for req in requests:
        output = outputs[req.request_id]
        prompt_len, n = len(req.prompt.token_ids), req.params.n
        if output.error is not None:
            fits = prompt_len < limit and n <= engine.config.max_num_seqs
            fits = fits and engine.scheduler._longest(prompt_len, n) > prompt_len
            assert not fits, output.error
            continue
        room = min(limit, engine.scheduler._longest(prompt_len, n)) - prompt_len
        assert len(output.outputs) == n
        assert len({answer.token_ids[0] for answer in output.outputs}) == n
        for answer in output.outputs:
            most = min(req.params.max_tokens or room, room)
            want, margin = plain_greedy(model, req, most, answer.token_ids[0] if n > 1 else None)
            if margin > TIE:
                assert answer.token_ids == want
            stopped = answer.token_ids[-1] in (req.params.stop_token_ids or ())
            assert answer.finish_reason == ("stop" if stopped else "length")
            assert answer.stop_reason == (answer.token_ids[-1] if stopped else None)


def test_greedy_is_the_same_in_any_company(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    preemptions = hits = chunks = rounds = 0
    # A round may happen to preempt nobody: go on until one has, but not for ever.
    while rounds < 15 or (rounds < 60 and not (preemptions and hits and chunks)):
        # Every third pool is very likely too small for its requests together.
        tight = {"block_size": 2, "num_blocks": 28, "max_num_seqs": 6, "max_num_batched_tokens": 20}
        config = small_config(rng, **(tight if rounds % 3 == 0 else {}))
        rounds += 1
        engine = Engine(model, config)
        requests = random_requests(rng, rng.randint(2, 10))
        outputs = drive(engine, requests, rng if rng.random() < 0.7 else None)
        assert_as_alone(model, requests, outputs, engine)
        metrics = [o.metrics for o in outputs.values() if o.metrics]
        preemptions += sum(m.preemptions for m in metrics)
        hits += sum(m.cached_prompt_tokens for m in metrics)
        chunks += config.max_num_batched_tokens < 20
    assert preemptions, "the pools were never too small: the test tests nothing"
    assert hits
    assert chunks


def test_forks_share_and_part(model: MiniCPMV, seed: int) -> None:
    """Several samples a request: one prefill, blocks shared, each answer as if it had been alone."""
    rng = random.Random(seed)
    preemptions = copies = rounds = 0
    while rounds < 15 or (rounds < 60 and not (preemptions and copies)):
        tight = {"block_size": 2, "num_blocks": 32} if rounds % 3 == 0 else {}
        config = small_config(rng, max_num_seqs=rng.randint(4, 7), max_num_batched_tokens=16, **tight)
        rounds += 1
        engine = Engine(model, config)
        engine._chooser = TopFirst()  # type: ignore[assignment]
        copies -= engine.runner.copied_blocks
        requests = random_requests(rng, rng.randint(2, 7), widest=4)
        outputs = drive(engine, requests, rng if rng.random() < 0.7 else None)
        assert_as_alone(model, requests, outputs, engine)
        preemptions += sum(o.metrics.preemptions for o in outputs.values() if o.metrics)
        copies += engine.runner.copied_blocks
    assert preemptions
    assert copies


def test_aborts_at_any_time(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        engine = Engine(model, small_config(rng, max_num_seqs=5, max_num_batched_tokens=12))
        engine._chooser = TopFirst()  # type: ignore[assignment]
        requests = random_requests(rng, 9, widest=3)
        aborted: set[str] = set()

        def abort(step: int, engine: Engine = engine, aborted: set[str] = aborted) -> None:
            if rng.random() < 0.15 and engine._groups:
                request_id = rng.choice(sorted(engine._groups))
                aborted.add(request_id)
                engine.abort_request(request_id)
                engine.scheduler.check()
                engine.abort_request(request_id)

        outputs = drive(engine, requests, rng, abort)
        for request_id in aborted:
            reasons = {answer.finish_reason for answer in outputs[request_id].outputs}
            assert "abort" in reasons
        rest = [r for r in requests if r.request_id not in aborted]
        assert_as_alone(model, rest, outputs, engine)


def test_a_preempted_group_comes_back_with_the_blocks_it_had(model: MiniCPMV) -> None:
    """Four samples share the prompt; computed again apart they would not fit."""
    engine = Engine(
        model, EngineConfig(num_blocks=20, block_size=4, max_num_seqs=8, enable_prefix_caching=False)
    )
    engine._chooser = TopFirst()  # type: ignore[assignment]
    first = request("first", words(random.Random(1), 15), greedy(30))
    samples = request("samples", words(random.Random(2), 32), greedy(9, n=4))
    outputs = drive(engine, [first, samples], max_steps=200)
    assert_as_alone(model, [first, samples], outputs, engine)
    assert outputs["samples"].metrics is not None
    assert outputs["samples"].metrics.preemptions > 0
