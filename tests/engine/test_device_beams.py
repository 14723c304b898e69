"""Searches that advance on the device, steps ahead of the host: the answers of those that the host advances."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

from huoyan.api.outputs import RequestOutput
from huoyan.api.sampling_params import SamplingParams
from huoyan.engine import device_beams
from huoyan.engine.beam_ops import BeamOps
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.request import EngineRequest
from huoyan.engine.scheduler import Scheduler
from huoyan.engine.sequence import Sequence
from huoyan.layers.beam_step import TOKEN
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.harness import drive
from tests.engine.support import VOCAB, greedy, picture, request, tiny_model, words

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


def test_the_device_is_a_step_ahead(models: dict[int, MiniCPMV]) -> None:
    """The second token waits for the host, which gives the beams blocks; no later one does, and none is in vain."""
    engine = Engine(models[VOCAB], EngineConfig(num_blocks=40, block_size=4, run_ahead=True))
    params = SamplingParams(temperature=0, use_beam_search=True, best_of=3, max_tokens=5, ignore_eos=True)
    engine.add_request(request("b", words(random.Random(1), 9), params))
    launched = []
    forward = engine.runner.forward

    def noted(schedule, before=None):  # type: ignore[no-untyped-def]
        launched.append([len(c.sequence.output_ids) for c in schedule.chunks])
        return forward(schedule, before)

    engine.runner.forward = noted  # type: ignore[method-assign]
    seen = []
    while engine.has_unfinished_requests():
        seen += [[len(answer.token_ids) for answer in out.outputs] for out in engine.step()]
    assert seen == [[1], [2], [3], [4], [5]]
    assert launched == [[0], [1, 1, 1], [1, 1, 1], [2, 2, 2], [3, 3, 3]]


def test_what_is_streamed_is_the_same(models: dict[int, MiniCPMV], seed: int) -> None:
    """The best so far, output by output; only the call that brings it is another."""
    rng = random.Random(seed)
    for _ in range(5):
        req = random_search(rng, "b", VOCAB)
        streams = []
        for run_ahead in (False, True):
            engine = Engine(models[VOCAB], EngineConfig(num_blocks=200, block_size=4, run_ahead=run_ahead))
            engine.add_request(req)
            stream = []
            while engine.has_unfinished_requests():
                stream += [[(a.token_ids, a.finish_reason) for a in o.outputs] for o in engine.step()]
            streams.append(stream)
        assert streams[0] == streams[1]


def test_a_search_that_ends_early_has_computed_one_step_in_vain(
    models: dict[int, MiniCPMV], seed: int
) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        stops = rng.sample(range(VOCAB), VOCAB // 2)
        req = random_search(rng, "b", VOCAB, early_stopping=True, max_tokens=40, stop_token_ids=stops)
        steps = []
        for run_ahead in (False, True):
            engine = Engine(models[VOCAB], EngineConfig(num_blocks=200, block_size=4, run_ahead=run_ahead))
            drive(engine, [req])
            steps.append(engine.stats().steps)
        assert steps[0] <= steps[1] <= steps[0] + 1


def test_others_are_not_held_up(models: dict[int, MiniCPMV], seed: int) -> None:
    """Beside a search a greedy request goes on being launched before its last token is known."""
    rng = random.Random(seed)
    engine = Engine(models[VOCAB], EngineConfig(num_blocks=200, block_size=4, run_ahead=True))
    params = SamplingParams(temperature=0, use_beam_search=True, best_of=3, max_tokens=20, ignore_eos=True)
    engine.add_request(request("b", words(rng, 9), params))
    engine.add_request(request("g", words(rng, 9), greedy(25)))
    ahead = 0
    while engine.has_unfinished_requests():
        engine.step()
        ahead += engine._in_flight is not None
    assert ahead == 25, "all of its steps"


def test_aborts_at_any_time(models: dict[int, MiniCPMV], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        engine = Engine(
            models[VOCAB], dataclasses.replace(config(rng, True), run_ahead=True), eos_token_id=EOS
        )
        requests = [random_search(rng, f"b{i}", VOCAB) for i in range(7)]
        aborted: set[str] = set()

        def abort(step: int, engine: Engine = engine, aborted: set[str] = aborted) -> None:
            if rng.random() < 0.15 and engine._groups:
                request_id = rng.choice(sorted(engine._groups))
                aborted.add(request_id)
                engine.abort_request(request_id)
                engine.scheduler.check()

        outputs = drive(engine, requests, rng, abort)
        rest = [req for req in requests if req.request_id not in aborted]
        plain = dataclasses.replace(engine.config, run_ahead=False)
        assert_same(rest, [drive(Engine(models[VOCAB], plain, eos_token_id=EOS), requests), outputs])


def test_preempted_at_any_time(
    models: dict[int, MiniCPMV], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a step is under way, after which the beams are others than those that lost their blocks."""
    rng = random.Random(seed)
    counted = Counted(monkeypatch)
    for _ in range(8):
        plain = dataclasses.replace(config(rng, False), block_size=rng.choice([2, 4, 8]))
        requests = [random_search(rng, f"b{i}", VOCAB, max_tokens=25, stop_token_ids=[EOS]) for i in range(3)]
        engine = Engine(models[VOCAB], dataclasses.replace(plain, run_ahead=True), eos_token_id=EOS)

        def preempt(step: int, scheduler: Scheduler = engine.scheduler) -> None:
            while scheduler.running and rng.random() < 0.2:
                scheduler._preempt(scheduler.running[-1])

        outputs = drive(engine, requests, rng, preempt)
        assert_same(requests, [drive(Engine(models[VOCAB], plain, eos_token_id=EOS), requests), outputs])
    assert counted.replanned > 20


def test_a_device_that_decides_otherwise_is_found_out(models: dict[int, MiniCPMV], seed: int) -> None:
    """One search gets an error, and no wrong answer; the other goes on."""
    rng = random.Random(seed)
    engine = Engine(models[VOCAB], EngineConfig(num_blocks=200, block_size=4, run_ahead=True))
    assert engine._device_beams is not None

    class Wrong(BeamOps):
        steps = 0

        def advance(self, logits, orders, before, count):  # type: ignore[no-untyped-def]
            found, state = super().advance(logits, orders, before, count)
            self.steps += 1
            if self.steps == 5:
                found[0, 0, TOKEN] = (found[0, 0, TOKEN] + 1) % VOCAB
            return found, state

    engine._device_beams.ops = Wrong()
    params = SamplingParams(temperature=0, use_beam_search=True, best_of=3, max_tokens=9, ignore_eos=True)
    requests = [request(name, words(rng, 9), params) for name in ("wrong", "right")]
    outputs = drive(engine, requests)
    assert "the device went on with" in (outputs["wrong"].error or "")
    assert outputs["wrong"].outputs == []
    own = Engine(models[VOCAB], EngineConfig(num_blocks=200, block_size=4, run_ahead=False))
    assert_same(requests[1:], [drive(own, requests[1:]), outputs])


def test_what_fails_on_the_device_ends_the_searches_alone(models: dict[int, MiniCPMV], seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(models[VOCAB], EngineConfig(num_blocks=200, block_size=4, run_ahead=True))
    assert engine._device_beams is not None
    advance = engine._device_beams.ops.advance
    calls = iter(range(99))

    def failing(*args, **kwargs):  # type: ignore[no-untyped-def]
        if next(calls) == 3:
            raise RuntimeError("no more")
        return advance(*args, **kwargs)

    engine._device_beams.ops.advance = failing  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, use_beam_search=True, best_of=3, max_tokens=9, ignore_eos=True)
    outputs = drive(engine, [request("b", words(rng, 9), params), request("g", words(rng, 9), greedy(25))])
    assert "no more" in (outputs["b"].error or "")
    assert outputs["g"].error is None
    assert len(outputs["g"].outputs[0].token_ids) == 25


@pytest.mark.parametrize(
    "params",
    [
        {"stop": "x"},
        {"repetition_penalty": 1.1},
        {"min_tokens": 2},
        {"logit_bias": {5: 1.0}},
        {"logprobs": 7},
        {"prompt_logprobs": 1},
    ],
)
def test_who_needs_the_host_has_it(models: dict[int, MiniCPMV], params: dict[str, object]) -> None:
    engine = Engine(models[VOCAB], EngineConfig(num_blocks=40, block_size=4, run_ahead=True))
    common = {"temperature": 0, "use_beam_search": True, "best_of": 3}
    engine.add_request(request("host", [5, 6], SamplingParams(**common, **params)))  # type: ignore[arg-type]
    engine.add_request(request("device", [5, 6], SamplingParams(**common)))  # type: ignore[arg-type]
    groups = list(engine._groups.values())
    assert [group.advances_on_device for group in groups] == [False, True]
    assert [group.needs_host for group in groups] == [True, False]


def test_a_device_that_fails_its_trial_leaves_it_to_the_host(
    models: dict[int, MiniCPMV], seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """First torch's operations take the kernels' place, and if those fail too, the host does."""
    rng = random.Random(seed)
    params = SamplingParams(temperature=0, use_beam_search=True, best_of=3, max_tokens=9, ignore_eos=True)
    requests = [request(f"b{i}", words(rng, 9), params) for i in range(2)]
    outputs = []
    for broken in (frozenset({"KernelBeamOps"}), frozenset({"KernelBeamOps", "BeamOps"})):

        def probe(ops: BeamOps, *sizes: object, broken: frozenset[str] = broken) -> None:
            if type(ops).__name__ in broken:
                raise RuntimeError("not here")

        monkeypatch.setattr(device_beams, "probe", probe)
        engine = Engine(models[VOCAB], EngineConfig(num_blocks=200, block_size=4, run_ahead=True))
        assert engine._device_beams is not None
        engine._device_beams._form = SimpleNamespace(device=torch.device("cuda"))  # type: ignore[assignment]
        outputs.append(drive(engine, requests))
        assert type(engine._device_beams.ops) is BeamOps
        assert engine._device_beams._works == {4: "BeamOps" not in broken}
    assert_same(requests, outputs)
    assert "torch's take their place" in caplog.text
    assert "the host advances them" in caplog.text
