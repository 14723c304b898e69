"""Launches that are noted, and compiled side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from huoyan.engine import plain_tokens, step_graph
from huoyan.engine.decode_graph import DecodeGraphs, _Graph
from huoyan.engine.device_beams import DeviceBeams
from huoyan.engine.graph_memory import GraphMemory
from huoyan.engine.kv_cache import KVCache
from huoyan.engine.picture_encoder import PictureEncoder
from huoyan.engine.rehearsal import compile_ahead
from huoyan.engine.step_graph import StepGraphs
from huoyan.kernels import launching
from huoyan.kernels.add_rms_norm import add_rms_norm
from huoyan.kernels.launching import launches_are_noted, noted_launches
from tests.engine.support import tiny_model


def norm_of(x: torch.Tensor) -> torch.Tensor:
    return add_rms_norm(x, None, torch.ones(x.shape[1], dtype=x.dtype, device=x.device), 1e-6)[0]


def of_three_dtypes(device: torch.device) -> launching.NotedLaunches:
    with noted_launches() as noted:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            norm_of(torch.ones(2, 64, dtype=dtype, device=device))
    return noted


def test_what_is_noted_is_not_launched(device: torch.device) -> None:
    x = torch.full((4, 64), 3.0, device=device)
    with noted_launches() as noted:
        norm_of(x)
        norm_of(x[:2])
        assert len(noted) == 1
        norm_of(x.half())
        assert len(noted) == 2
        assert launches_are_noted()
    assert not launches_are_noted()
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
    noted = of_three_dtypes(device)
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
        assert [tuple(logits.shape) for logits in graphs.rehearse()] == [
            (size, model.config.text.vocab_size) for size in reversed(graphs._sizes)
        ]
        steps.rehearse()
    with noted_launches() as whole, torch.inference_mode():
        for size in graphs._sizes:
            graphs._inputs.clear(size)
            _Graph(model, cache, graphs._hidden[:size], graphs._inputs, size).forward()
            model.head(graphs._hidden[:size])
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


def test_a_rehearsal_that_fails_does_not_stop_the_start() -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    graphs = SimpleNamespace(rehearse=fails)
    compile_ahead(torch.device("cpu"), graphs, graphs, SimpleNamespace(), None)  # type: ignore[arg-type]
    assert not launches_are_noted()


def test_choices_pictures_and_searches_are_rehearsed_too(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(42, head_dim=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    cache = KVCache(1, 40, 4, 1, 64, model.dtype, model.device)
    seen: list[set[str]] = []
    monkeypatch.setattr(
        launching.NotedLaunches,
        "compile",
        lambda self, *_: seen.append(
            {job[0].fn.__module__.rpartition(".")[2] for job in self._jobs.values()}
        ),
    )
    monkeypatch.setattr(plain_tokens, "chooses_by_kernel", lambda logits: True)
    logits = torch.randn(3, model.config.text.vocab_size)
    encoder = PictureEncoder(model, 8, on_device=True)
    compile_ahead(
        torch.device("cpu"),
        SimpleNamespace(rehearse=lambda: iter([logits])),  # type: ignore[arg-type]
        SimpleNamespace(rehearse=lambda: None),  # type: ignore[arg-type]
        encoder,
        DeviceBeams(cache, model.config.text.vocab_size),
    )
    of_searches = {"beam_advance", "beam_candidates", "beam_move", "copy_blocks"}
    assert seen[0] >= of_searches | {"choose_rows", "sampling_floors", "picture_patches"}


def test_what_a_helper_compiles_is_loaded_and_the_rest_compiled(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = of_three_dtypes(device)
    seen, asked = [], []
    monkeypatch.setattr(launching, "_compile", lambda job: seen.append(job[1][0].dtype))
    monkeypatch.setattr(launching, "_target", lambda: ("cuda", 90, 32))

    class Helper:
        def compile(self, jobs: Iterator[str | None], target: tuple[str, int, int]) -> Iterator[int]:
            asked.extend([target, *jobs])
            # One is said twice, one never was asked for, and one it does not say.
            yield from (1, 1, 7, 2)

    noted.compile(device, Helper())  # type: ignore[arg-type]
    assert sorted(map(str, seen)) == ["torch.bfloat16", "torch.float16", "torch.float32"]
    assert asked[0] == ("cuda", 90, 32)
    assert len(asked) == 4
