"""Pictures that are encoded while decodes go on, as on a GPU's second stream: here the stream is played."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from huoyan.engine.config import EngineConfig
from huoyan.engine.encoder_graph import EncoderGraphs
from huoyan.engine.engine import Engine
from huoyan.engine.schedule import Schedule
from huoyan.media.types import PreparedPicture
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.siglip import PackedGrids
from huoyan.planning.pieces import ENCODER_GRAPH_LONGEST, ENCODER_GRAPH_SLICES
from tests.engine.harness import TopFirst, drive, small_config
from tests.engine.support import greedy, picture, plain_greedy, request, tiny_model, words


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return tiny_model(11)


class Played:
    """Embeddings that are noise until their event has come to pass, or was waited for."""

    def __init__(self, stream: Stream, real: list[Tensor]) -> None:
        self.stream = stream
        # The first takes some steps in any case, so that a prompt waits for its picture.
        self.left = max(stream.rng.randint(0, 4), 0 if stream.running else 3)
        self.real = real
        self.shown = [torch.randn_like(e) for e in real]

    @torch.inference_mode()
    def _finish(self) -> None:
        for shown, real in zip(self.shown, self.real, strict=True):
            shown.copy_(real)
        self.left = 0

    def query(self) -> bool:
        if self.left == 0:
            self._finish()
        return self.left == 0

    def wait(self) -> None:
        self.stream.waits += self.left > 0
        self._finish()


class Stream:
    """Puts an engine's encoder on a stream of its own; `tick` lets one step's time go by."""

    def __init__(self, engine: Engine, rng: random.Random, bad: Sequence[bytes] = ()) -> None:
        self.rng = rng
        self.running: list[Played] = []
        self.waits = self.beside = self.inline = self.most_at_once = 0
        inner, forward = engine.runner.encoder.encode, engine.runner.forward

        def encode(pictures: Sequence[PreparedPicture], beside: bool) -> tuple[list[Tensor], Any]:
            if any(p.key in bad for p in pictures):
                raise ValueError("cannot encode this")
            real = inner(pictures)[0]
            self.inline += not beside
            if not beside:
                return real, None
            played = Played(self, real)
            self.running.append(played)
            self.most_at_once = max(self.most_at_once, sum(p.left > 0 for p in self.running))
            return played.shown, played

        def forwards(schedule: Schedule, *before: Any) -> Any:
            self.beside += bool(schedule.decodes) and any(p.left for p in self.running)
            return forward(schedule, *before)

        engine.runner.encoder.encode = encode  # type: ignore[method-assign]
        engine.runner.forward = forwards  # type: ignore[method-assign]
        engine.scheduler.encodes_beside = True

    def tick(self, step: int) -> None:
        for played in self.running:
            played.left = max(played.left - 1, 0)


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("most_slices", [4, 60])
def test_answers_are_the_plain_model_s_and_decodes_go_on(
    model: MiniCPMV, seed: int, run_ahead: bool, most_slices: int
) -> None:
    """With the fewer slices a step many pictures queue up, and are encoded before the decodes."""
    rng = random.Random(seed)
    config = EngineConfig(num_blocks=300, max_num_seqs=8, max_encoder_slices=most_slices, run_ahead=run_ahead)
    engine = Engine(model, config)
    stream = Stream(engine, rng)
    requests = [request("text", words(rng, 6), greedy(60))]
    for i in range(8):
        parts = [*words(rng, 4), picture(rng, 2), *words(rng, 2), picture(rng, 1), *words(rng, 3)]
        requests.append(request(f"r{i}", parts, greedy(6)))
    held = 0

    def between(step: int) -> None:
        nonlocal held
        stream.tick(step)
        held += any(group.pinned for group in engine.scheduler.running)

    outputs = drive(engine, requests, rng, between)
    for req in requests:
        assert (
            outputs[req.request_id].outputs[0].token_ids
            == plain_greedy(model, req, req.params.max_tokens or 0)[0]
        )
    if most_slices == 60:
        assert held, "no prompt ever waited for its picture"
        assert stream.inline <= 1, "the first pictures only may come before there are decodes"
    else:
        assert stream.inline > 1


def test_a_decode_never_waits_for_the_encoder(model: MiniCPMV, seed: int) -> None:
    """With a stream that outlives all requests, every step has a token until the last, and nothing is waited for."""
    rng = random.Random(seed)
    engine = Engine(model, EngineConfig(num_blocks=300, max_num_seqs=8, max_encoder_slices=24))
    stream = Stream(engine, rng)
    engine.add_request(request("text", words(rng, 6), greedy(60)))
    engine.step()
    late = [request(f"r{i}", [*words(rng, 4), picture(rng, 2), *words(rng, 3)], greedy(4)) for i in range(6)]
    stream.rng = type("Slow", (), {"randint": staticmethod(lambda a, b: 20)})()  # type: ignore[assignment]
    for step in range(40):
        for asked in late[3 * step : 3 * step + 3]:
            engine.add_request(asked)
        tokens = {o.request_id: len(o.outputs[0].token_ids) for o in engine.step()}
        assert tokens["text"] == step + 2
        engine.scheduler.check()
        stream.tick(step)
        assert stream.waits == 0
    assert stream.beside >= 38
    assert stream.most_at_once == 1, "batches queue up behind each other"
    assert not stream.inline


def test_a_queue_of_pictures_is_encoded_before_the_decodes(model: MiniCPMV, seed: int) -> None:
    """Where many wait, every step encodes what its own prompts read, and no batch beside it."""
    rng = random.Random(seed)
    engine = Engine(
        model, EngineConfig(num_blocks=300, max_num_seqs=16, max_encoder_slices=4, run_ahead=True)
    )
    stream = Stream(engine, rng)
    requests = [request("text", words(rng, 6), greedy(30))]
    engine.add_request(requests[0])
    engine.step()
    for i in range(9):
        requests.append(request(f"r{i}", [*words(rng, 4), picture(rng, 2), *words(rng, 3)], greedy(4)))
        engine.add_request(requests[-1])
    engine.step()
    assert stream.inline == 1
    assert not stream.running
    done = {}
    for step in range(60):
        stream.tick(step)
        done.update({o.request_id: o for o in engine.step() if o.finished})
        engine.scheduler.check()
    assert stream.inline >= 3
    for req in requests:
        assert (
            done[req.request_id].outputs[0].token_ids
            == plain_greedy(model, req, req.params.max_tokens or 0)[0]
        )


@pytest.mark.parametrize("round", range(4))
def test_any_traffic_in_any_engine(model: MiniCPMV, seed: int, round: int) -> None:
    rng = random.Random(seed + round)
    pool = [picture(rng, rng.randint(1, 3)) for _ in range(4)]
    requests = []
    for i in range(rng.randint(3, 9)):
        parts: list[int | PreparedPicture] = words(rng, rng.randint(1, 9))
        for _ in range(rng.choice([0, 1, 1, 2])):
            parts += [rng.choice(pool), *words(rng, rng.randint(1, 4))]
        requests.append(request(f"r{i}", parts, greedy(rng.randint(1, 9))))
    config = small_config(rng, num_blocks=120)
    plain, beside = Engine(model, config), Engine(model, config)
    plain._chooser = beside._chooser = TopFirst()  # type: ignore[assignment]
    expected = drive(plain, requests, random.Random(seed))
    stream = Stream(beside, rng)
    got = drive(beside, requests, random.Random(seed), stream.tick)
    for req in requests:
        one, other = expected[req.request_id], got[req.request_id]
        assert one.error == other.error
        if one.error is None:
            assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_a_broken_picture_ends_its_requests_at_once(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    broken, whole = picture(rng, 2), picture(rng, 2)
    engine = Engine(model, EngineConfig(num_blocks=200))
    stream = Stream(engine, rng, bad=[broken.key])
    requests = [
        request("text", words(rng, 12), greedy(40)),
        request("good", [*words(rng, 4), whole, 9]),
        request("bad", [broken, 9]),
    ]
    engine.add_request(requests[0])
    engine.step()
    for late in requests[1:]:
        engine.add_request(late)
    ended = [o for o in engine.step() if o.finished]
    assert [o.request_id for o in ended] == ["bad"]
    assert "cannot encode this" in str(ended[0].error)
    done = {}
    for step in range(100):
        stream.tick(step)
        done.update({o.request_id: o for o in engine.step() if o.finished})
    assert set(done) == {"text", "good"}
    assert done["good"].outputs[0].token_ids == plain_greedy(model, requests[1], 8)[0]


class Recorded:
    """Stands in for captured graphs: says which sizes were captured, and gives what an encoder would."""

    def __init__(self) -> None:
        self.captured: list[int] = []

    def __call__(self, size: int) -> Any:
        self.captured.append(size)
        return type("Graph", (), {"replay": staticmethod(lambda x, lengths: x + len(lengths))})()


def test_encoder_graphs_serve_all_grids_that_have_room() -> None:
    recorded = Recorded()
    graphs = EncoderGraphs(recorded, sizes=(10, 20))

    def run(*grids: tuple[int, int]) -> bool:
        packed = PackedGrids(grids)
        x = torch.zeros(sum(packed.lengths), 1)
        out = graphs.run(x, packed)
        assert out is None or torch.equal(out, x + len(grids))
        return out is not None

    assert [run((2, 3)), run((2, 5)), run((1, 1), (1, 7))] == [False, True, True]
    assert [run((2, 6)), run((1, 1), (3, 5)), run((2, 3))] == [False, True, True]
    assert recorded.captured == [10, 20], "each size once, when it is needed again"
    assert not run((3, 7)), "too many patches"
    assert not run(*[(1, 1)] * (ENCODER_GRAPH_SLICES + 1)), "too many slices"
    at_once = EncoderGraphs(recorded, sizes=(10, 20, ENCODER_GRAPH_LONGEST + 8))
    at_once.capture_all()
    assert recorded.captured[2:] == [ENCODER_GRAPH_LONGEST + 8, 20, 10], (
        "the largest makes room for the others"
    )
    one, two = PackedGrids([(1, ENCODER_GRAPH_LONGEST)]), PackedGrids([(1, ENCODER_GRAPH_LONGEST + 1)])
    assert at_once.run(torch.zeros(ENCODER_GRAPH_LONGEST, 1), one) is not None
    assert at_once.run(torch.zeros(ENCODER_GRAPH_LONGEST + 1, 1), two) is None, "a slice is too long"


def test_what_cannot_be_captured_is_launched() -> None:
    def capture(size: int) -> Any:
        if size > 10:
            raise RuntimeError("CUDA out of memory")
        return Recorded()(size)

    graphs = EncoderGraphs(capture, sizes=(10, 20))
    one, two = PackedGrids([(2, 2)]), PackedGrids([(2, 2), (4, 3)])
    few, many = torch.zeros(4, 1), torch.zeros(16, 1)
    assert [graphs.run(few, one) is None for _ in range(2)] == [True, False]
    assert [graphs.run(many, two) is None for _ in range(3)] == [True, True, True]
    assert graphs.run(few, one) is not None, "what was captured goes on"
    assert graphs.num_captured == 1
