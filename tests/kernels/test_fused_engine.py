"""The engine as a GPU runs it, kernels in Triton's interpreter: 8-bit caches, and guesses as decode rows."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from huoyan.engine import decode_graph, runner, step_graph
from huoyan.engine import engine as engine_module
from huoyan.engine.beam_ops_cuda import KernelBeamOps
from huoyan.engine.config import EngineConfig
from huoyan.engine.decode_graph import _Graph
from huoyan.engine.decode_inputs import DecodeInputs
from huoyan.engine.engine import Engine
from huoyan.engine.kv_cache import KVCache
from huoyan.engine.speculation import NgramSpeculation
from huoyan.kernels import paged_decode
from huoyan.models.minicpmv import MiniCPMV
from huoyan.planning.graphs import StepGraphSize
from tests.engine.harness import drive
from tests.engine.support import PlainAttention, greedy, plain_logits, request, tiny_model, words
from tests.engine.test_kv_cache import ThroughEightBits
from tests.engine.test_speculation import Oracle


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/engine/test_gpu.py has the kernels themselves")
@pytest.mark.parametrize("name", ["auto", "int8"])
def test_the_fused_path(seed: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is the plain model's likeliest, or within rounding of it; with guesses and without."""
    rng = random.Random(seed)
    model = tiny_model(41, head_dim=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    monkeypatch.setattr(runner, "has_fused_attention", lambda model, kv_name: True)
    monkeypatch.setattr(paged_decode, "parts_for", lambda batch, kv_heads: 2)
    requests = [request(f"r{i}", words(rng, rng.randint(3, 12)), greedy(5)) for i in range(2)]
    sizes = {"num_blocks": 40, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 12}
    config = EngineConfig(**sizes, kv_cache_dtype=name, enforce_eager=True)  # type: ignore[arg-type]
    plain = drive(Engine(model, config), requests)
    attention = PlainAttention() if name == "auto" else ThroughEightBits(name, 64)
    for req in requests:
        ids = plain[req.request_id].outputs[0].token_ids
        logits = plain_logits(model, req, ids, attention)[len(req.prompt.token_ids) - 1 : -1]
        behind = logits.amax(-1) - logits[torch.arange(len(ids)), torch.tensor(ids)]
        assert float(behind.max()) < (1e-4 if name == "auto" else 0.05)
    speculation = NgramSpeculation(4, 2, 1)
    engine = Engine(model, EngineConfig(**{**vars(config), "speculation": speculation}))
    answers = {name: output.outputs[0].token_ids for name, output in plain.items()}
    engine._speculator = Oracle(speculation, answers, rng)
    for request_id, output in drive(engine, requests).items():
        assert output.outputs[0].token_ids == answers[request_id]
    assert engine.stats().draft_tokens


class ReplayedHere(_Graph):
    """A graph whose replay computes it anew: all but the capture is as on a GPU, inputs and their corrections too."""

    def __init__(
        self, model: MiniCPMV, cache: KVCache, hidden: Tensor, inputs: DecodeInputs, size: int
    ) -> None:
        here = SimpleNamespace(replay=self.forward, pool=lambda: (0, 0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "CUDAGraph", lambda: here)
            super().__init__(model, cache, hidden, inputs, size)

    def capture(self, pool: tuple[int, int] | None) -> None:
        self._inputs.clear(self._size)
        self.forward()


class StepReplayedHere(step_graph._Graph):
    """The same of a step that computes prompts."""

    def __init__(self, model: MiniCPMV, x: Tensor, inputs: step_graph._Inputs, size: StepGraphSize) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.forward))
            super().__init__(model, x, inputs, size)

    def capture(self, pool: tuple[int, int] | None) -> None:
        self._inputs.clear(self._size)
        self.forward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/engine/test_gpu.py has the kernels themselves")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["auto", "int8"])
def test_beams_on_the_fused_path(seed: int, name: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches that advance by kernels, prompts among them, give what the host gives that advances them."""
    rng = random.Random(seed)
    model = tiny_model(41, head_dim=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    for module in (runner, engine_module):
        monkeypatch.setattr(module, "has_fused_attention", lambda model, kv_name: True)
    monkeypatch.setattr(paged_decode, "parts_for", lambda batch, kv_heads: 2)
    monkeypatch.setattr(decode_graph, "_Graph", ReplayedHere)
    monkeypatch.setattr(decode_graph, "_USES_BEFORE_CAPTURE", 2)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(step_graph, "_Graph", StepReplayedHere)
    requests = [
        request(f"b{width}", words(rng, rng.randint(3, 9)), greedy(6, n=width, use_beam_search=True))
        for width in (2, 3)
    ]
    requests.append(request("g", words(rng, 20), greedy(4)))
    sizes = {"num_blocks": 60, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 12}
    config = EngineConfig(**sizes, kv_cache_dtype=name, enforce_eager=not graphs)  # type: ignore[arg-type]
    outputs = []
    for run_ahead in (False, True):
        engine = Engine(model, EngineConfig(**{**vars(config), "run_ahead": run_ahead}))
        if run_ahead:
            assert engine._device_beams is not None
            engine._device_beams.ops = KernelBeamOps()
        outputs.append(drive(engine, requests))
        # Searches among prompts, by graphs.
        assert not graphs or engine.runner._step_graphs.num_captured  # type: ignore[union-attr]
    for req in requests:
        host, device = (found[req.request_id] for found in outputs)
        assert device.error is None
        assert [a.token_ids for a in host.outputs] == [a.token_ids for a in device.outputs]
        for a, b in zip(host.outputs, device.outputs, strict=True):
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-4)
