"""Launches that are noted, and compiled side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from huoyan.engine import runner, step_graph
from huoyan.engine.decode_graph import DecodeGraphs, _Graph
from huoyan.engine.graph_memory import GraphMemory
from huoyan.engine.kv_cache import KVCache
from huoyan.engine.step_graph import StepGraphs
from huoyan.kernels import launching
from huoyan.kernels.add_rms_norm import add_rms_norm
from huoyan.kernels.launching import launched, noted_launches
from tests.engine.support import tiny_model


def norm_of(x: torch.Tensor) -> torch.Tensor:
    return add_rms_norm(x, None, torch.ones(x.shape[1], dtype=x.dtype, device=x.device), 1e-6)[0]


def test_what_is_noted_is_not_launched(device: torch.device) -> None:
    x = torch.full((4, 64), 3.0, device=device)
    with noted_launches() as noted:
        norm_of(x)
        norm_of(x[:2])
        assert len(noted) == 1
        norm_of(x.half())
        assert len(noted) == 2
        with launched():
            torch.testing.assert_close(norm_of(x), torch.ones_like(x))
        norm_of(x.half())
    assert len(noted) == 2
    torch.testing.assert_close(norm_of(x), torch.ones_like(x))


def test_other_threads_launch(device: torch.device) -> None:
    x, got = torch.full((4, 64), 3.0, device=device), []
    with noted_launches() as noted:
        other = threading.Thread(target=lambda: got.append(norm_of(x)))
        other.start()
        other.join()
    assert not len(noted)
    torch.testing.assert_close(got[0], torch.ones_like(x))


def test_all_are_compiled_and_failures_are_left_to_the_launch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with noted_launches() as noted:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            norm_of(torch.ones(2, 64, dtype=dtype, device=device))
    seen = []

    def one(job: launching.Job) -> None:
        seen.append(job[1][0].dtype)
        if job[1][0].dtype is torch.float16:
            raise RuntimeError("not this one")

    monkeypatch.setattr(launching, "_compile", one)
    noted.compile(device)
    assert set(seen) == {torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_a_rehearsal_has_all_that_a_step_launches(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers launch what all layers do, in every size."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    model = tiny_model(41, head_dim=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
    cache = KVCache(4, 40, 4, 1, 64, model.dtype, model.device, kv)
    graphs = DecodeGraphs(model, cache, 64, 64)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    steps = StepGraphs(
        model,
        cache,
        GraphMemory.of(model),
        max_num_batched_tokens=256,
        max_num_seqs=64,
        max_model_len=64,
        decodes_alone=64,
    )
    with noted_launches() as rehearsed, torch.inference_mode():
        graphs.rehearse()
        steps.rehearse()
    with noted_launches() as whole, torch.inference_mode():
        for size in graphs._sizes:
            _Graph(model, cache, graphs._hidden[:size], graphs._inputs, size).forward()
        for step in (*steps._prompts, *steps._mixed):
            step_graph._Graph(model, steps._x[: step.tokens], steps._inputs, step).forward()
    assert len(whole)
    assert whole._jobs.keys() == rehearsed._jobs.keys()


def test_stand_ins_are_compiled_like_what_they_stand_for() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("stand_ins.py")
    ran = subprocess.run(
        [sys.executable, str(script)],
        env=env | {"PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) > 50


def test_a_rehearsal_that_fails_does_not_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    graphs = SimpleNamespace(rehearse=fails)
    here = SimpleNamespace(_graphs=graphs, _step_graphs=graphs, device=torch.device("cpu"))
    runner.Runner._compile_ahead(here)  # type: ignore[arg-type]
    assert launching._noting.now is None
