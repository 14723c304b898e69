"""The engine from outside: what it refuses, how it ends things, what it reports."""

from __future__ import annotations

import dataclasses
import os
import random

import pytest
import torch

from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.in_flight import InFlight
from huoyan.engine.schedule import Schedule
from huoyan.errors import CapacityError, InputError
from huoyan.models.minicpmv import MiniCPMV
from huoyan.prompt.types import EncodedPrompt, PictureSlot
from tests.engine.harness import Known, TopFirst, drive
from tests.engine.support import greedy, picture, plain_greedy, plain_logits, request, tiny_model, words


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return tiny_model(11)


# -- refused at the door -------------------------------------------------------------------------------------


def test_prompt_longer_than_the_context_is_refused_with_the_numbers(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(max_model_len=40))
    with pytest.raises(InputError, match=r"41 tokens \(5 of them pictures\).* 40 "):
        engine.add_request(request("r", [*[7] * 35, picture(random.Random(1))]))
    assert len(drive(engine, [request("fits", [7] * 39)])["fits"].outputs[0].token_ids) == 1
    with pytest.raises(InputError, match="empty"):
        engine.add_request(request("r", []))


def test_what_can_never_fit_is_refused_with_the_numbers(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(num_blocks=10, block_size=4, max_num_seqs=8))
    engine._chooser = TopFirst()  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"33 tokens with 3 .* 11 blocks of 4 .* has 10"):
        engine.add_request(request("r", [7] * 33, greedy(4, n=3)))
    with pytest.raises(InputError, match="9 sequences at once, but max_num_seqs is 8"):
        engine.add_request(request("r", [7], greedy(4, n=9)))
    assert not engine.has_unfinished_requests()


def test_bad_ids_and_pictures_are_refused(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(num_blocks=100))
    with pytest.raises(InputError, match=r"token id 89 .* vocabulary of 89"):
        engine.add_request(request("r", [5, 89]))
    with pytest.raises(InputError, match="token id -1"):
        engine.add_request(request("r", [5, -1]))
    good = request("r", [5, picture(random.Random(0), 2), 6])
    without = dataclasses.replace(good, pictures=())
    with pytest.raises(InputError, match="places for 1 pictures, but 0"):
        engine.add_request(without)
    for slot in (PictureSlot((2,), 5), PictureSlot((2, 8), 4)):
        with pytest.raises(InputError, match="does not fit its place"):
            engine.add_request(
                dataclasses.replace(good, prompt=EncodedPrompt(good.prompt.token_ids, (slot,)))
            )
    slot = PictureSlot((2, 12), 5)
    with pytest.raises(InputError, match="outside of the prompt"):
        engine.add_request(dataclasses.replace(good, prompt=EncodedPrompt(good.prompt.token_ids, (slot,))))
    engine.add_request(good)
    with pytest.raises(InputError, match="running already"):
        engine.add_request(good)


def test_sizes_that_make_no_sense_are_refused(model: MiniCPMV, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (
        {"block_size": 0},
        {"max_num_seqs": 0},
        {"max_model_len": 0},
        {"gpu_memory_utilization": 0.0},
        {"gpu_memory_utilization": 1.5},
        {"picture_cache_bytes": -1},
        {"max_num_seqs": 9, "max_num_batched_tokens": 8},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            EngineConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="made for 256"):
        Engine(model, EngineConfig(max_model_len=300))
    with pytest.raises(CapacityError, match=r"holds 32 tokens, but max_model_len is 100"):
        Engine(model, EngineConfig(max_model_len=100, num_blocks=2))
    monkeypatch.setenv("HUOYAN_CPU_KV_MB", "plenty")
    with pytest.raises(InputError, match="HUOYAN_CPU_KV_MB"):
        Engine(model)
    monkeypatch.setenv("HUOYAN_CPU_KV_MB", "1")
    assert Engine(model).size.num_blocks == (1 << 20) // (2 * 2 * 16 * 2 * 16 * 4)


# -- one request's fault is not another's --------------------------------------------------------------------


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(num_blocks=100, max_num_seqs=2))
    requests = [request(f"r{i}", [5 + i, 6]) for i in range(4)]
    forward = engine.runner.forward
    broken = True

    def fail(schedule: Schedule, before: InFlight | None) -> object:
        nonlocal broken
        if broken:
            broken = False
            raise RuntimeError("the device is\nunhappy")
        return forward(schedule, before)

    engine.runner.forward = fail  # type: ignore[method-assign, assignment]
    outputs = drive(engine, requests)
    for i in (0, 1):
        assert outputs[f"r{i}"].error is not None
        assert "the device is unhappy" in str(outputs[f"r{i}"].error)
    for i in (2, 3):
        assert outputs[f"r{i}"].outputs[0].token_ids == plain_greedy(model, requests[i], 8)[0]


def test_a_token_that_cannot_be_chosen_ends_its_request_only(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(num_blocks=100))

    class Moody(TopFirst):
        def choose(self, logits, rows, before=None, drafts=None):  # type: ignore[no-untyped-def]
            chosen = super().choose(logits, rows, before).read()
            bad = InputError("no token is allowed here")
            return Known({g: bad if g.request_id == "bad" else c for g, c in chosen.items()})

    engine._chooser = Moody()  # type: ignore[assignment]
    requests = [request("good", [5, 6]), request("bad", [7, 8])]
    outputs = drive(engine, requests)
    assert outputs["bad"].error == "no token is allowed here"
    assert outputs["good"].outputs[0].token_ids == plain_greedy(model, requests[0], 8)[0]


# -- ends ----------------------------------------------------------------------------------------------------


def test_ends_at_the_context_and_says_length(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(max_model_len=30))
    outputs = drive(engine, [request("r", [5] * 20, greedy(None)), request("s", [5] * 20, greedy(500))])
    for output in outputs.values():
        assert len(output.outputs[0].token_ids) == 10
        assert output.outputs[0].finish_reason == "length"


def test_a_pool_too_small_for_all_answers_says_so(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(num_blocks=12, block_size=4))
    engine._chooser = TopFirst()  # type: ignore[assignment]
    output = drive(engine, [request("r", [5] * 9, greedy(30, n=3))])["r"]
    assert [len(a.token_ids) for a in output.outputs] == [12] * 3
    assert "12 tokens for each of 3" in output.warnings[0]


def test_stop_tokens_and_eos(model: MiniCPMV) -> None:
    req = request("r", [5, 6, 7], greedy(12))
    answer, _ = plain_greedy(model, req, 12)
    third = answer[2]
    first_seen = answer.index(third) + 1

    def run(eos: int | None, stops: tuple[int, ...], **params: object) -> object:
        engine = Engine(model, EngineConfig(num_blocks=50), eos_token_id=eos, stop_token_ids=stops)
        params.setdefault("ignore_eos", False)
        return drive(engine, [request("r", [5, 6, 7], greedy(12, **params))])["r"].outputs[0]

    ended = run(third, (third,))
    assert (len(ended.token_ids), ended.finish_reason, ended.stop_reason) == (first_seen, "stop", None)  # type: ignore[attr-defined]
    named = run(None, (third,))
    assert (len(named.token_ids), named.stop_reason) == (first_seen, third)  # type: ignore[attr-defined]
    own = run(None, (), stop_token_ids=[third])
    assert (len(own.token_ids), own.stop_reason) == (first_seen, third)  # type: ignore[attr-defined]
    ignored = run(third, (third,), ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason) == (answer, "length")  # type: ignore[attr-defined]


# -- what is reported ----------------------------------------------------------------------------------------


def test_outputs_are_cumulative_and_timed(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(num_blocks=50))
    engine.add_request(request("r", [5, 6, 7], greedy(6)))
    seen = []
    while engine.has_unfinished_requests():
        seen.extend(engine.step())
    lengths = [len(output.outputs[0].token_ids) for output in seen]
    assert lengths == [1, 2, 3, 4, 5, 6], "earlier outputs are not changed by later steps"
    assert [output.finished for output in seen] == [False] * 5 + [True]
    metrics = seen[-1].metrics
    assert metrics is not None
    times = (
        metrics.arrival_time,
        metrics.first_scheduled_time,
        metrics.first_token_time,
        metrics.finished_time,
    )
    assert None not in times
    assert list(times) == sorted(times)  # type: ignore[type-var]
    assert metrics.time_to_first_token is not None


def test_stats_count_what_was_done(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(model, EngineConfig(num_blocks=50, block_size=4, max_num_seqs=1))
    pic = picture(rng, 2)
    for i in range(2):
        engine.add_request(request(f"r{i}", [*words(rng, 5), pic, 7], greedy(3)))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.steps) == (1, 1, 1)
    assert (stats.blocks_used, stats.blocks_total) == (5, 50)
    while engine.has_unfinished_requests():
        engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.generated_tokens) == (2 * 18, 2 * 3)
    assert (stats.picture_misses, stats.picture_hits, stats.preemptions) == (1, 1, 0)
    assert stats.blocks_cached > 0


def test_abort_is_returned_once_with_what_there_was(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(num_blocks=50))
    engine.add_request(request("r", [5, 6, 7], greedy(6)))
    engine.step()
    engine.step()
    engine.abort_request("r")
    engine.abort_request("r")
    engine.abort_request("unknown")
    assert engine.has_unfinished_requests()
    (output,) = engine.step()
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"
    assert len(output.outputs[0].token_ids) == 2
    assert not engine.has_unfinished_requests()
    assert engine.step() == []
    engine.add_request(request("r", [5, 6, 7], greedy(6)))


@pytest.mark.parametrize("budget", [3, 64])
def test_prompt_logprobs(model: MiniCPMV, seed: int, budget: int) -> None:
    rng = random.Random(seed)
    config = EngineConfig(num_blocks=60, block_size=4, max_num_seqs=3, max_num_batched_tokens=budget)
    engine = Engine(model, config)
    prompt = [*words(rng, 9), picture(rng, 2), *words(rng, 5)]
    plain = request("warm", prompt)
    asks = request("asks", prompt, greedy(3, prompt_logprobs=4))
    drive(engine, [plain])
    output = drive(engine, [asks])["asks"]
    entries = output.prompt_logprobs
    assert entries is not None
    assert len(entries) == len(asks.prompt.token_ids)
    assert entries[0] is None
    logprobs = plain_logits(model, asks, []).log_softmax(-1)
    for i, token in enumerate(asks.prompt.token_ids[1:]):
        entry = entries[i + 1]
        assert entry is not None
        assert len(entry) in (4, 5)
        assert entry[token].logprob == pytest.approx(float(logprobs[i, token]), abs=1e-4)
        assert entry[token].rank == int((logprobs[i] > logprobs[i, token]).sum()) + 1
        best = torch.topk(logprobs[i], 4)
        assert [t for t, e in entry.items() if (e.rank or 99) <= 4] == best.indices.tolist()


# -- order ---------------------------------------------------------------------------------------------------


def test_first_come_first_served_and_last_come_first_preempted(model: MiniCPMV) -> None:
    config = EngineConfig(num_blocks=13, block_size=2, max_num_seqs=8, max_num_batched_tokens=8)
    engine = Engine(model, config)
    requests = [request(f"r{i}", [5 + i, 6, 7], greedy(18)) for i in range(6)]
    finished = []
    for req in requests:
        engine.add_request(req)
    preempted: dict[str, int] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished.append(output.request_id)
                assert output.metrics is not None
                preempted[output.request_id] = output.metrics.preemptions
    assert finished == [f"r{i}" for i in range(6)]
    assert preempted["r0"] == 0
    assert sum(preempted.values()) > 0


def test_decodes_go_on_while_a_long_prompt_is_computed(model: MiniCPMV) -> None:
    engine = Engine(model, EngineConfig(max_num_batched_tokens=10, max_num_seqs=4))
    engine.add_request(request("short", [5, 6], greedy(40)))
    engine.step()
    engine.add_request(request("long", [7] * 100, greedy(2)))
    for _ in range(11):
        outputs = {output.request_id for output in engine.step()}
        assert outputs == {"short"}, "a stream stalls, or the prompt is computed in too few steps"
    assert {output.request_id for output in engine.step()} == {"short", "long"}


# -- determinism ---------------------------------------------------------------------------------------------


def test_greedy_alone_and_in_a_batch_of_sixty_four(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    requests = [request(f"r{i}", words(rng, rng.randint(1, 60)), greedy(10)) for i in range(64)]
    together = drive(Engine(model, EngineConfig()), requests)
    for req in requests[::7]:
        alone = drive(Engine(model, EngineConfig()), [req])[req.request_id].outputs[0]
        if plain_greedy(model, req, 10)[1] > 1e-4:
            assert together[req.request_id].outputs[0].token_ids == alone.token_ids


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_the_cache_of_a_cpu_is_bounded_and_takes_no_memory_before_it_is_used(
    model: MiniCPMV, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HUOYAN_CPU_KV_MB", raising=False)
    monkeypatch.setattr("huoyan.engine.sizing.total_memory", lambda: 1 << 20)
    small = Engine(model).size
    assert small.total_bytes <= (1 << 20) // 4
    monkeypatch.undo()
    large = tiny_model(1, max_position_embeddings=1 << 16)
    before = _resident()
    engine = Engine(large)
    assert engine.size.max_model_len == 1 << 16
    assert engine.size.total_bytes > 200 << 20
    assert _resident() - before < 20 << 20


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
