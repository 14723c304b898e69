"""Pictures in the engine: encoded once, bounded, and a bad one harms nobody else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.picture_cache import PictureCache
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.harness import drive
from tests.engine.support import greedy, picture, plain_greedy, request, tiny_model, words


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return tiny_model(7)


class Counting:
    """Counts what the encoder is given; refuses slices of the value `poison`."""

    def __init__(self, model: MiniCPMV, monkeypatch: pytest.MonkeyPatch, poison: int | None = None) -> None:
        self.batches: list[int] = []
        self.slices: list[bytes] = []
        inner = model.encode_slices

        def encode(slices: Sequence[Any]) -> torch.Tensor:
            if poison is not None and any((s == poison).all() for s in slices):
                raise ValueError("cannot encode this")
            self.batches.append(len(slices))
            self.slices.extend(s.tobytes() for s in slices)
            return inner(slices)

        monkeypatch.setattr(model, "encode_slices", encode)


def test_one_picture_of_many_requests_is_encoded_once(
    model: MiniCPMV, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    counting = Counting(model, monkeypatch)
    pic = picture(rng, 4)
    engine = Engine(model, EngineConfig(num_blocks=200, max_num_seqs=3, enable_prefix_caching=False))
    requests = [request(f"r{i}", [*words(rng, 5), pic, *words(rng, 3)]) for i in range(8)]
    drive(engine, requests, rng)
    assert len(counting.slices) == 4
    assert engine.pictures.misses == 1
    assert engine.pictures.hits == 7


def test_encoding_is_batched_over_requests_and_bounded(
    model: MiniCPMV, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    counting = Counting(model, monkeypatch)
    engine = Engine(model, EngineConfig(num_blocks=500, max_num_seqs=20, max_encoder_slices=6))
    requests = [request(f"r{i}", [5, picture(rng, 2), 6]) for i in range(6)]
    requests.append(request("large", [5, picture(rng, 9), 6]))
    drive(engine, requests)
    assert counting.batches[:2] == [6, 6], "six requests with two slices each are two batches"
    assert max(counting.batches) == 6
    assert len(counting.slices) == 6 * 2 + 9


def test_cache_is_bounded_while_pictures_stream_through(
    model: MiniCPMV, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    one_slice = 5 * 64 * 4
    config = EngineConfig(
        num_blocks=500, max_num_seqs=4, max_num_batched_tokens=20, picture_cache_bytes=6 * one_slice
    )
    engine = Engine(model, config)
    requests = [
        request(f"r{i}", [5, picture(rng, 3), *words(rng, 4), picture(rng, 3), 6], greedy(4))
        for i in range(8)
    ]
    most = 0

    def look(step: int) -> None:
        nonlocal most
        most = max(most, engine.pictures.used_bytes)

    outputs = drive(engine, requests, rng, look)
    assert 0 < most <= (6 + 3) * one_slice
    for req in requests:
        assert outputs[req.request_id].outputs[0].token_ids == plain_greedy(model, req, 4)[0]


def test_same_words_with_another_picture_are_not_the_same_prefix(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(model, EngineConfig(num_blocks=200, block_size=4))
    before, after = words(rng, 9), words(rng, 9)
    pics = [picture(rng, 2), picture(rng, 2)]
    twins = [request(f"r{i}", [*before, pics[i % 2], *after]) for i in range(4)]
    outputs = {}
    for req in twins:
        outputs.update(drive(engine, [req]))
    cached = [outputs[f"r{i}"].metrics.cached_prompt_tokens for i in range(4)]  # type: ignore[union-attr]
    assert cached[0] == 0
    assert cached[1] == 8, "only the words before the picture are shared"
    assert cached[2] == cached[3] == 28, "all but the last block of 30 tokens"
    for req in twins:
        assert outputs[req.request_id].outputs[0].token_ids == plain_greedy(model, req, 8)[0]


def test_two_pictures_exchanged_are_another_prompt(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(model, EngineConfig(num_blocks=200, block_size=4))
    a, b = picture(rng), picture(rng)
    for req in (request("ab", [9, a, b, 8, 7, 6]), request("ba", [9, b, a, 8, 7, 6])):
        output = drive(engine, [req])[req.request_id]
        assert output.metrics is not None
        assert output.metrics.cached_prompt_tokens == 0
        assert output.outputs[0].token_ids == plain_greedy(model, req, 8)[0]


def test_a_broken_picture_ends_its_requests_only(
    model: MiniCPMV, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    broken, whole = picture(rng, 2), picture(rng, 2)
    for piece in broken.slices:
        piece[:] = 77
    requests = [
        request("good", [*words(rng, 4), whole, 9]),
        request("bad", [*words(rng, 4), broken, 9]),
        request("bad later", [5, whole, *words(rng, 40), broken, 9]),
        request("text", words(rng, 12)),
    ]
    wanted = {r.request_id: plain_greedy(model, r, 8)[0] for r in requests}
    Counting(model, monkeypatch, poison=77)
    for config in (
        EngineConfig(num_blocks=200),
        EngineConfig(num_blocks=60, block_size=4, max_num_seqs=4, max_num_batched_tokens=9),
    ):
        outputs = drive(Engine(model, config), requests)
        for request_id in ("good", "text"):
            assert outputs[request_id].error is None
            assert outputs[request_id].outputs[0].token_ids == wanted[request_id]
        for request_id in ("bad", "bad later"):
            assert outputs[request_id].finished
            assert "cannot encode this" in str(outputs[request_id].error)
            assert outputs[request_id].outputs == []


def test_cache_evicts_least_recently_used_and_spares_pinned() -> None:
    cache = PictureCache(10, 1)
    for key, slices in ((b"a", 4), (b"b", 4)):
        assert cache.reserve(key, slices)
        cache.pin(key)
        cache.put(key, torch.zeros(slices, 1, 1))
    cache.unpin(b"a")
    assert cache.reserve(b"c", 5)
    assert b"a" not in cache
    assert b"b" in cache
    cache.pin(b"c")
    assert not cache.reserve(b"d", 2), "everything that is left is pinned"
    assert not cache.reserve(b"d", 2, force=True), "others will give theirs up"
    assert cache.reserve(b"d", 2, force=True, own={b"b", b"c"})
    cache.pin(b"d")
    cache.put(b"c", torch.zeros(5, 1, 1))
    cache.put(b"d", torch.zeros(2, 1, 1))
    assert cache.used_bytes == 11
    cache.unpin(b"d")
    assert cache.used_bytes <= 10, "over its capacity it gives up what nobody reads"
    cache.check({b"b": 1, b"c": 1})


def test_a_reservation_nobody_waits_for_is_given_up() -> None:
    cache = PictureCache(10, 1)
    assert cache.reserve(b"a", 4)
    cache.pin(b"a")
    cache.unpin(b"a")
    assert b"a" not in cache
    cache.put(b"a", torch.zeros(4, 1, 1))
    with pytest.raises(KeyError):
        cache.get(b"a")


def test_pictures_as_arrays_are_not_changed(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    pic = picture(rng, 2)
    before = [s.copy() for s in pic.slices]
    drive(Engine(model, EngineConfig(num_blocks=100)), [request("r", [5, pic, 6])])
    assert all(np.array_equal(a, b) for a, b in zip(before, pic.slices, strict=True))


def test_warming_up_runs_a_pass_and_keeps_nothing() -> None:
    engine = Engine(tiny_model(3), EngineConfig(num_blocks=20))
    passes: list[int] = []
    inner = engine.model.encode_patches
    engine.model.encode_patches = lambda x, grids: passes.append(len(x)) or inner(x, grids)  # type: ignore
    engine.runner.capture_all()
    assert passes == [256]
    assert not len(engine.pictures)
