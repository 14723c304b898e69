"""What cards of some sizes hold of the published model, by the plan: pure sums, no device."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from huoyan.engine.config import EngineConfig
from huoyan.errors import InputError
from huoyan.planning.advice import what_fits
from huoyan.planning.allocator import grows, reserved_bytes
from huoyan.planning.budget import CardState, card_budget
from huoyan.planning.driver import GRAPH_DRIVER, context_bytes
from huoyan.planning.graphs import graph_sizes
from huoyan.planning.memory import CUBLAS_VARIABLE, Memory, cublas_bytes, graph_driver_bytes, memory
from huoyan.planning.shapes import published_shapes
from huoyan.planning.sizes import GIB, MIB, gib, parse_bytes
from huoyan.planning.workspace import Way
from tests.plan.shapes import FULL

CONTEXT = context_bytes()

SHAPES = published_shapes(FULL)
CUDA = Way(itemsize=2, cuda=True)


def parts(int4: bool, way: Way = CUDA, **options: object) -> Memory:
    return memory(FULL, EngineConfig(**options), way, SHAPES, int4=int4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "int4, seqs, tokens, sequences",
    [(False, 128, 142_500, 69), (False, 256, 142_500, 69), (True, 256, 309_500, 151)],
)
def test_twenty_four_gib(int4: bool, seqs: int, tokens: int, sequences: int) -> None:
    """What is reached, with the context that an H200 was seen to have; wanted are 145 000 and 310 000 tokens."""
    found = parts(int4, max_num_seqs=seqs)
    assert abs(found.weights.total - (6.63e9 if int4 else 16.22e9)) < 0.02e9
    blocks = found.blocks_in(24 * GIB)
    assert blocks * 16 >= tokens
    assert blocks // (2048 // 16) >= sequences
    assert found.fixed + blocks * found.block <= 24 * GIB
    # With the KV cache in 8 bits almost twice as many.
    small = memory(FULL, EngineConfig(max_num_seqs=seqs), CUDA, SHAPES, int4=int4, kv_dtype="int8")
    assert small.blocks_in(24 * GIB) > 1.8 * blocks


@pytest.mark.parametrize(
    "int4, seqs, tokens", [(False, 128, 137_500), (False, 256, 137_500), (True, 256, 302_000)]
)
def test_twenty_four_gib_with_kernels_and_graphs(int4: bool, seqs: int, tokens: int) -> None:
    """Graphs and the encoder beside decodes leave what the plain way does, or nearly."""
    kernels = replace(CUDA, kernels=True)
    found = parts(int4, kernels, max_num_seqs=seqs)
    assert found.graphs > 50 * MIB
    assert found.workspace.beside > 50 * MIB
    blocks = found.blocks_in(24 * GIB)
    assert blocks * 16 >= tokens
    assert blocks // (2048 // 16) >= (147 if int4 else 67)
    for kv_dtype, times in (("int8", 1.84), ("fp8", 1.93)):
        small = memory(
            FULL, EngineConfig(max_num_seqs=seqs), kernels, SHAPES, int4=int4, kv_dtype=kv_dtype
        ).blocks_in(24 * GIB)
        assert times * blocks < small < 2 * blocks


def test_a_graph_more_costs_what_the_driver_keeps_of_it() -> None:
    kernels = replace(CUDA, kernels=True)
    few, many = (parts(False, kernels, max_num_seqs=seqs) for seqs in (8, 64))
    assert graph_sizes(64)[: len(graph_sizes(8))] == graph_sizes(8) == [1, 2, 4, 8]
    more = graph_driver_bytes(kernels, many.limits) - graph_driver_bytes(kernels, few.limits)
    assert more == 3 * GRAPH_DRIVER
    assert more < many.graphs - few.graphs < more + 20 * MIB, "no logits are kept for any of them"


@pytest.mark.parametrize("int4", [False, True])
def test_the_largest_slice_has_the_memory_of_a_step_and_of_the_encoder_beside(int4: bool) -> None:
    found = parts(int4, replace(CUDA, kernels=True), max_num_seqs=256)
    space = found.workspace
    assert found.limits.encoder_patches >= EngineConfig().max_slice_patches
    both = space.beside + max(space.decoder, space.choice)
    assert space.peak == max(space.encoder, both) < 1.1 * both


def test_smaller_cards() -> None:
    assert parts(False).blocks_in(12 * GIB) == 0
    assert parts(True).blocks_in(12 * GIB) * 16 >= 32768, "a full context in 12 GiB"
    assert 8192 <= parts(True).blocks_in(8 * GIB) * 16 < 32768
    assert parts(True).blocks_in(6 * GIB) == 0


def test_graphs_cost_memory_and_eager_gives_it_back() -> None:
    kernels = replace(CUDA, kernels=True)
    assert parts(False, kernels).graphs > 100 * MIB
    assert parts(False, kernels, enforce_eager=True).graphs == 0


def test_more_of_a_step_takes_more(seed: int) -> None:
    rng = random.Random(seed)
    low = parts(
        rng.random() < 0.5, max_num_seqs=rng.randint(1, 64), max_num_batched_tokens=rng.randint(64, 2048)
    )
    for name, factor in (("max_num_batched_tokens", 8), ("max_num_seqs", 16)):
        sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 2048}
        sizes[name] *= factor
        assert parts(low.weights.int4, **sizes).workspace.total > low.workspace.total  # type: ignore[arg-type]


def test_what_was_told_is_kept_to(seed: int) -> None:
    """Whatever else is on the card: weights, context, cache and the rest stay inside, and torch is stopped there."""
    rng = random.Random(seed)
    for _ in range(200):
        total = rng.randint(8, 141) * GIB
        reserved = rng.randint(1, total // GIB - 2) * GIB // 2
        outside = rng.choice([CONTEXT // 2, CONTEXT, 2 * CONTEXT, 3 * CONTEXT, 5 * GIB])
        free = max(total - reserved - outside, 0)
        beside, driver = rng.randint(100, 2000) * MIB, rng.randint(0, 50) * MIB
        told = rng.choice([None, rng.randint(1, total // GIB) * GIB])
        utilization = rng.choice([0.3, 0.9, 1.0])
        found = card_budget(CardState(total, free, reserved), utilization, told, beside, driver)
        ours = min(outside, 2 * CONTEXT) if outside <= 2 * CONTEXT else CONTEXT
        if found.kv <= 0:
            continue
        assert found.kv + beside <= free, "more than the card has"
        whole = reserved + ours + beside + found.kv
        if told is not None:
            assert whole <= told
        else:
            assert total - free + beside + found.kv <= total * utilization
        assert found.torch + driver == reserved + beside + found.kv
        assert found.torch <= total


def test_a_cap_on_a_large_card_gives_what_the_small_card_has() -> None:
    """`gpu_memory="24GiB"` on an H200 is a card of 24 GiB with nothing else on it."""
    weights = 16 * GIB
    large = CardState(140 * GIB, 140 * GIB - weights - CONTEXT, weights)
    small = CardState(24 * GIB, 24 * GIB - weights - CONTEXT, weights)
    assert card_budget(large, 0.9, 24 * GIB, GIB).kv == card_budget(small, 1.0, None, GIB).kv


def test_advice_names_what_then_fits() -> None:
    asked = EngineConfig()
    dense = what_fits(FULL, asked, CUDA, 12 * GIB, int4=False)
    assert dense == "the int4 checkpoint fits (context 32768)"
    tight = what_fits(FULL, asked, CUDA, 8 * GIB, int4=True)
    assert tight.startswith("max_model_len=")
    length = int(tight.split("=")[1].split()[0])
    assert (
        memory(FULL, EngineConfig(max_model_len=length), CUDA, SHAPES, int4=True).blocks_in(8 * GIB) * 16
        >= length
    )
    few = what_fits(FULL, asked, CUDA, int(7.25 * GIB), int4=True)
    assert "max_num_seqs=8" in few
    nothing = what_fits(FULL, asked, CUDA, 4 * GIB, int4=True)
    assert "least it runs in is" in nothing
    assert "\n" not in dense + tight + few + nothing


def test_allocator_hands_out_whole_segments(seed: int) -> None:
    assert reserved_bytes([1]) == 2 * MIB
    assert reserved_bytes([512] * 4096) == 2 * MIB
    assert reserved_bytes([512] * 4097) == 4 * MIB
    assert reserved_bytes([3 * MIB] * 6) == 20 * MIB
    assert reserved_bytes([3 * MIB] * 7) == 40 * MIB
    assert reserved_bytes([11 * MIB]) == 12 * MIB
    rng = random.Random(seed)
    sizes = [rng.randint(1, 30 * MIB) for _ in range(100)]
    assert sum(sizes) <= reserved_bytes(sizes) <= 1.3 * sum(sizes) + 22 * MIB


def test_segments_that_grow_waste_the_end_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 30 * MIB) for _ in range(100)]
    assert sum(sizes) <= reserved_bytes(sizes, growing=True) < sum(sizes) + 22 * MIB + 512 * len(sizes)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    for said, expected in ((None, True), ("expandable_segments:True", True), ("max_split_size_mb:64", False)):
        if said is None:
            monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        else:
            monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", said)
        assert grows() == expected


def test_amounts() -> None:
    assert (
        parse_bytes("24GiB")
        == parse_bytes("24 g")
        == parse_bytes("24576MiB")
        == parse_bytes(24 * GIB)
        == 24 * GIB
    )
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("1.5GiB") == 3 * GIB // 2
    for wrong in ("", "24 apples", "-3GiB", "GiB", "0", True, None, 2.5):
        with pytest.raises(InputError, match="gpu_memory is"):
            parse_bytes(wrong, "gpu_memory")  # type: ignore[arg-type]
    assert [gib(n) for n in (3 * GIB // 2, 700 * MIB, 2048)] == ["1.5 GiB", "700 MiB", "2 KiB"]


@pytest.mark.parametrize(
    ("said", "each"), [("", 8 * MIB), (":16384:1", 16 * MIB), (":4096:2:16:8", 8320 * 1024)]
)
def test_cublas_has_what_its_variable_says(said: str, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS_VARIABLE, said)
    assert cublas_bytes(Way(itemsize=2, cuda=True, kernels=True)) == 4 * each
    assert cublas_bytes(Way(itemsize=2, cuda=False)) == 0
