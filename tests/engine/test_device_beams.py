"""Searches that advance on the device, steps ahead of the host: the answers of those that the host advances."""

from __future__ import annotations

import dataclasses
import random

import pytest

from huoyan.api.outputs import RequestOutput
from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.request import EngineRequest
from huoyan.engine.scheduler import Scheduler
from huoyan.engine.sequence import Sequence
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.harness import drive
from tests.engine.support import VOCAB, picture, request, tiny_model, words

EOS = 7


@pytest.fixture(scope="module")
def models() -> dict[int, MiniCPMV]:
    """By vocabulary: of a small one beams are often few, and end often."""
    return {VOCAB: tiny_model(47), 9: tiny_model(48, vocab_size=9)}


def random_search(rng: random.Random, name: str, vocab: int, **fixed: object) -> EngineRequest:
    width = rng.randint(2, 6)
    values: dict[str, object] = {
        "temperature": 0,
        "use_beam_search": True,
        "best_of": width,
        "n": rng.randint(1, width),
        "max_tokens": rng.choice([1, 2, 5, 12, 25, None]),
        "early_stopping": rng.choice([True, False, "never"]),
        "length_penalty": rng.choice([1.0, 0.0, -1.0, 2.5]),
        "stop_token_ids": rng.sample(range(vocab), rng.choice([0, 1, vocab // 6, vocab // 2])),
        "ignore_eos": rng.random() < 0.3,
        "logprobs": rng.choice([None, None, 0, 2, 2 * width, 9]),
        **fixed,
    }
    ids = [rng.randrange(5, vocab) for _ in range(rng.randint(1, 20))]
    return request(name, ids, SamplingParams(**values))  # type: ignore[arg-type]


def random_other(rng: random.Random, name: str) -> EngineRequest:
    """Greedy, sampled, several, penalised, and searches that need the host."""
    kind = rng.choice(["greedy", "sampled", "several", "penalised", "host beams"])
    params = SamplingParams(
        temperature=0.0 if kind in ("greedy", "host beams") else 1.0,
        seed=rng.randrange(99),
        max_tokens=rng.choice([1, 6, 20]),
        ignore_eos=True,
        repetition_penalty=1.2 if kind in ("penalised", "host beams") else 1.0,
        n=2 if kind in ("several", "host beams") else 1,
        use_beam_search=kind == "host beams",
    )
    return request(
        name, [*words(rng, rng.randint(1, 12)), *([picture(rng)] if rng.random() < 0.3 else [])], params
    )


def assert_same(requests: list[EngineRequest], outputs: list[dict[str, RequestOutput]]) -> None:
    for req in requests:
        want, got = (found[req.request_id] for found in outputs)
        assert got.error == want.error
        for a, b in zip(want.outputs, got.outputs, strict=True):
            assert a.token_ids == b.token_ids, req
            assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-4)
            assert [list(step) for step in a.logprobs or ()] == [list(step) for step in b.logprobs or ()]


class Counted:
    """How often beams took over blocks on the device, and how often searches came back after a preemption."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = self.replanned = 0
        take_over, plan = Scheduler.take_over, Scheduler._plan_resumption_by_tokens

        def counted(scheduler: Scheduler, seq: Sequence, parent: Sequence) -> None:
            self.taken += 1
            take_over(scheduler, seq, parent)

        def planned(scheduler: Scheduler, group: object) -> None:
            self.replanned += 1
            plan(scheduler, group)  # type: ignore[arg-type]

        monkeypatch.setattr(Scheduler, "take_over", counted)
        monkeypatch.setattr(Scheduler, "_plan_resumption_by_tokens", planned)


def config(rng: random.Random, tight: bool) -> EngineConfig:
    size = rng.choice([1, 2, 4, 8])
    tokens = rng.randint(48, 90) if tight else 900
    return EngineConfig(
        num_blocks=-(-tokens // size),
        block_size=size,
        max_num_seqs=rng.randint(6, 14),
        max_num_batched_tokens=rng.choice([14, 24, 64]),
        enable_prefix_caching=rng.random() < 0.7,
    )


@pytest.mark.parametrize("tight", [False, True])
def test_nothing_else_comes_of_it(
    models: dict[int, MiniCPMV], seed: int, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    counted = Counted(monkeypatch)
    rounds = 0
    # A round may happen to preempt no search: go on until one has, but not for ever.
    while rounds < 12 or (tight and rounds < 80 and not counted.replanned):
        rounds += 1
        vocab = rng.choice([VOCAB, 9])
        plain = config(rng, tight)
        requests = [random_search(rng, f"b{i}", vocab) for i in range(rng.randint(2, 6))]
        if vocab == VOCAB:
            requests += [random_other(rng, f"o{i}") for i in range(rng.randint(0, 3))]
        rng.shuffle(requests)
        arrivals = rng.choice([None, seed])
        outputs = []
        for run_ahead in (False, True):
            engine = Engine(models[vocab], dataclasses.replace(plain, run_ahead=run_ahead), eos_token_id=EOS)
            outputs.append(drive(engine, requests, arrivals if arrivals is None else random.Random(arrivals)))
        assert_same(requests, outputs)
    assert counted.taken > 20
    assert not tight or counted.replanned
