"""The KV cache in 8 bits: what it takes, and how far it is from the exact one."""

from __future__ import annotations

import random

import pytest
import torch

from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.kv_cache import KVCache
from huoyan.engine.kv_format import kv_bytes_per_token, kv_format
from huoyan.engine.request import EngineRequest
from huoyan.errors import InputError
from huoyan.layers.kv_numbers import STORED_AS, dequantize, quantize
from huoyan.models.config import TextConfig
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.harness import TopFirst, drive, small_config
from tests.engine.support import PlainAttention, greedy, plain_logits, request, tiny_model, words

FULL_SIZE = TextConfig(3584, 18944, 28, 28, 4, 151666, 32768, head_dim=128)


def test_eight_bits_hold_almost_twice_the_tokens() -> None:
    exact = kv_bytes_per_token(FULL_SIZE, 2)
    assert exact == 2 * 28 * 4 * 128 * 2
    assert exact / kv_bytes_per_token(FULL_SIZE, 2, "int8") == pytest.approx(256 / 136)
    assert exact / kv_bytes_per_token(FULL_SIZE, 2, "fp8") == pytest.approx(256 / 130)
    for name in ("int8", "fp8", "fp8_e4m3", "fp8_e5m2"):
        assert exact / kv_bytes_per_token(FULL_SIZE, 2, name) > 1.88


def test_a_mistyped_dtype_is_named() -> None:
    for wrong in ("int4", "", "fp8_e3m4", None):
        with pytest.raises(InputError, match="use auto, int8, fp8"):
            EngineConfig(kv_cache_dtype=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name, bound", [("int8", 0.5 / 127), ("fp8", 2**-4), ("fp8_e5m2", 2**-3)])
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_numbers_come_back_within_half_a_step(seed: int, name: str, bound: float, dim: int) -> None:
    """int8: half a step of the group's largest; floats: half a unit of each number's own last bit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 3, dim, generator=generator) * torch.logspace(-3, 3, 50)[:, None, None]
    x[7, 1] = 0
    form = kv_format(name, dim)
    numbers, scales = quantize(x, STORED_AS[form.name], form.group)
    assert numbers.element_size() == 1
    assert scales.shape == (50, 3, form.scales)
    assert numbers.nbytes + scales.nbytes == 150 * form.bytes_per_head(4)
    error = (dequantize(numbers, scales, torch.float32) - x).abs()
    grouped = x.unflatten(-1, (-1, form.group)).abs()
    largest = grouped.amax(-1, keepdim=True).expand_as(grouped).flatten(-2)
    # The second part is what rounding the scale, and float16's end near zero, cost.
    relative_to = largest if name == "int8" else torch.maximum(x.abs(), largest * 2**-14)
    assert bool((error <= 1.02 * bound * relative_to + 2**-24).all())
    # And half a step is really lost: these are 8 bits.
    assert float((error / relative_to.clamp(min=1e-9)).max()) > 0.8 * bound


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ k.T) * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("name, bound", [("int8", 0.02), ("fp8", 0.09), ("fp8_e5m2", 0.17)])
def test_attention_over_eight_bits_is_near(seed: int, name: str, bound: float) -> None:
    """Twice what was measured on such numbers (benchmarks/NOTES.md): standard normal, 400 keys, 128 wide."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, 128, generator=generator) for n in (16, 400, 400))
    stored = KVCache(1, 1, 1, 1, 128, torch.float32, torch.device("cpu"), name).layer(0)[0]
    exact = dense_attention(q, k, v)
    error = dense_attention(q, stored.as_read(k), stored.as_read(v)) - exact
    assert 0 < float(error.norm() / exact.norm()) < bound


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_e5m2"])
def test_what_is_written_is_read_and_copied(seed: int, name: str) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cache = KVCache(2, 6, 4, 2, 64, torch.float32, torch.device("cpu"), name)
    slots = torch.tensor(rng.sample(range(24), 9))
    k, v = torch.randn(2, 9, 2, 64)
    cache.write(1, slots, k, v)
    for stored, x in zip(cache.layer(1), (k, v), strict=True):
        torch.testing.assert_close(stored.rows(slots, torch.float32), stored.as_read(x), rtol=0, atol=0)
    assert not cache.layer(0)[0].numbers.any()
    pair = rng.sample(range(6), 2)
    before = [stored.rows(torch.arange(24), torch.float32).view(6, 4, 2, 64) for stored in cache.layer(1)]
    cache.copy_blocks([(pair[0], pair[1])])
    for stored, old in zip(cache.layer(1), before, strict=True):
        now = stored.rows(torch.arange(24), torch.float32).view(6, 4, 2, 64)
        old[pair[1]] = old[pair[0]]
        torch.testing.assert_close(now, old, rtol=0, atol=0)


class ThroughEightBits(PlainAttention):
    """The plain attention, of keys and values that went through the cache's format."""

    def __init__(self, name: str, head_dim: int) -> None:
        self.stored = KVCache(1, 1, 1, 1, head_dim, torch.float32, torch.device("cpu"), name).layer(0)[0]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().__call__(layer, q, self.stored.as_read(k), self.stored.as_read(v))


ROUNDING = 0.05
"""Logits this close may swap: where a sum comes out a bit differently a number may fall to its neighbour."""


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_answers_do_not_depend_on_the_company(seed: int, name: str) -> None:
    """Chunks, prefixes, forks and preemption: each answer is that of the plain model with such keys and values."""
    rng = random.Random(seed)
    model = tiny_model(77, head_dim=64 if name == "int8" else 16)
    attention = ThroughEightBits(name, model.config.text.head_dim)
    preemptions = hits = copies = 0
    for i in range(4):
        sizes = {"max_num_seqs": 6, "max_num_batched_tokens": 16, "enable_prefix_caching": True}
        # Every second pool is surely too small for two requests of two samples; the others hold any one.
        tight = i % 2 == 0
        pool = {"block_size": 2, "num_blocks": 22} if tight else {"num_blocks": 64}
        engine = Engine(model, small_config(rng, **sizes, **pool, kv_cache_dtype=name))
        engine._chooser = TopFirst()  # type: ignore[assignment]
        opening = words(rng, 10)
        requests = [
            request(
                f"r{j}",
                [*opening, *words(rng, rng.randint(1, 9))],
                greedy(9, n=2 if tight else rng.randint(1, 3)),
            )
            for j in range(5)
        ]
        outputs = drive(engine, requests, None if tight else rng)
        for req in requests:
            output = outputs[req.request_id]
            assert output.error is None
            for answer in output.outputs:
                hold(model, attention, req, answer.token_ids)
            assert output.metrics is not None
            preemptions += output.metrics.preemptions
            hits += output.metrics.cached_prompt_tokens
        copies += engine.runner.copied_blocks
    assert preemptions
    assert hits
    assert copies


def hold(model: MiniCPMV, attention: PlainAttention, req: EngineRequest, answer: list[int]) -> None:
    """After the first token (of several samples, any of the likeliest) each is the likeliest, or near it."""
    logits = plain_logits(model, req, answer, attention)[len(req.prompt.token_ids) - 1 : -1]
    behind = logits.amax(-1) - logits[torch.arange(len(answer)), torch.tensor(answer)]
    assert float(behind[1 if req.params.n > 1 else 0 :].max()) < ROUNDING
