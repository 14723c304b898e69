"""The model that is measured: a checkpoint, or sizes alone with weights made up on the device."""

from __future__ import annotations

import contextlib
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from huoyan.bench.probe import Probe, probe
from huoyan.bench.rooflines import Rooflines, weight_format
from huoyan.errors import CapacityError, InputError
from huoyan.models import costs
from huoyan.planning.sizes import gib

if TYPE_CHECKING:
    from huoyan.api.async_llm import AsyncLLM
    from huoyan.api.llm import LLM
    from huoyan.api.runtime import Runtime
    from huoyan.engine.engine import Engine
    from huoyan.models.config import ModelConfig


@dataclass
class Opened:
    """A loaded model, how long that took, and what the device allows."""

    runtime: Runtime
    name: str
    load_seconds: float
    probe: Probe
    rooflines: Rooflines
    _owner: LLM | AsyncLLM | None = None
    """Who closes the backend."""

    @property
    def engine(self) -> Engine:
        return engine_of(self.runtime)

    def llm(self) -> LLM:
        """The model behind `LLM`; it is this, or `async_llm`, once."""
        from huoyan.api.llm import LLM

        self._owner = llm = LLM.from_runtime(self.runtime)
        return llm

    def async_llm(self) -> AsyncLLM:
        from huoyan.api.async_llm import AsyncLLM

        self._owner = llm = AsyncLLM.from_runtime(self.runtime)
        return llm

    def close(self) -> None:
        """Free the device's memory."""
        if self._owner is None:
            self.runtime.backend.close()
        elif hasattr(self._owner, "shutdown"):
            self._owner.shutdown()
        else:
            self._owner.close()

    def describe(self) -> dict[str, Any]:
        """The model, for a report."""
        model, engine = self.engine.model, self.engine
        weights = self.rooflines.weights
        return {
            "name": self.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "int4_group_size": weights.group_size,
            "load_s": self.load_seconds,
            "bytes_a_token": costs.decode_step(
                model.config, [1], weights, kv_token=self.rooflines.kv_token
            ).bytes,
            "max_model_len": engine.size.max_model_len,
            "kv_tokens": engine.size.num_blocks * engine.config.block_size,
        }


@contextlib.contextmanager
def folder_of(model: str, load_format: str) -> Iterator[tuple[str, str]]:
    """(what `LLM` opens, its load_format): a named shape becomes a folder without weights as long as this is open."""
    from huoyan.bench.checkpoint_shapes import named_shape

    named = named_shape(model)
    if named is None:
        yield model, load_format
        return
    from huoyan.bench.random_checkpoint import write_weightless_checkpoint

    with tempfile.TemporaryDirectory(prefix="huoyan-bench-") as temporary:
        folder = Path(temporary) / model
        write_weightless_checkpoint(folder, named[0], quantization=named[1])
        yield str(folder), "dummy"


@contextlib.contextmanager
def opened(model: str, *, load_format: str = "auto", **options: Any) -> Iterator[Opened]:
    """Load a model with `LLM`'s options, and probe its device.

    Raises:
        HuoyanError: as `LLM`.
    """
    from huoyan.api.loading import load_runtime
    from huoyan.api.options import parse_options
    from huoyan.models.hub import resolve_model

    with folder_of(model, load_format) as (name, how):
        where = resolve_model(name, **{key: options[key] for key in ("hub", "revision") if key in options})
        found = _probe(where, how, options)
        begun = time.perf_counter()
        runtime = load_runtime(parse_options(str(where), {**options, "load_format": how}))
        seconds = time.perf_counter() - begun
    engine = engine_of(runtime)
    kv_token = engine.size.bytes_per_block / engine.config.block_size
    lines = Rooflines(engine.model.config, weight_format(engine.model), kv_token, found.speed)
    loaded = Opened(runtime, model, seconds, found, lines)
    try:
        yield loaded
    finally:
        loaded.close()


def _probe(folder: Path, load_format: str, options: dict[str, Any]) -> Probe:
    """Before the engine has taken the device's memory; about as much as a decode step will read."""
    from huoyan.api.loading import pick_device
    from huoyan.engine.driver_limits import limit_cublas
    from huoyan.models.checkpoint import open_checkpoint
    from huoyan.models.weights import resolve_dtype

    checkpoint = open_checkpoint(folder, need_weights=load_format != "dummy")
    device = torch.device(pick_device(options.get("device", "auto")))
    dtype = resolve_dtype(options.get("dtype", "auto"), checkpoint, device)
    if device.type != "cuda" and not checkpoint.tensors:
        _check_host(folder.name, checkpoint.config, dtype)
    quantized = checkpoint.config.quantization
    group = None if quantized is None else quantized.get("group_size", 128)
    if not isinstance(group, int) or group < 1:
        group = None
    token = costs.decode_step(checkpoint.config, [1], costs.WeightFormat(dtype.itemsize, group))
    # As the engine would, which comes too late for it.
    limit_cublas(device)
    found = probe(device, dtype, int(token.bytes))
    if device.type == "cuda":
        # A workspace of cuBLAS's that the engine, on a stream of its own, would not use.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return found


def _check_host(name: str, config: ModelConfig, dtype: torch.dtype) -> None:
    """Refuse to make up weights for which there is no memory: the system would end the process without a word.

    Raises:
        CapacityError: they are too many.
    """
    from huoyan.engine.sizing import total_memory

    weights = costs.WeightFormat(dtype.itemsize)
    needed = costs.encoder_bytes(config, weights) + costs.decoder_bytes(config.text, weights)
    needed += 2 * costs.head_bytes(config.text, weights)
    if needed > total_memory():
        raise CapacityError(
            f"{name} takes {gib(int(needed))} of random weights in {str(dtype).removeprefix('torch.')} and this "
            f"machine has {gib(total_memory())}: use a GPU, --dtype bfloat16, or --model small or tiny"
        )


def engine_of(runtime: Runtime) -> Engine:
    """The native engine, whose sizes are needed.

    Raises:
        InputError: another backend.
    """
    from huoyan.engine.engine import Engine

    if not isinstance(runtime.backend, Engine):
        raise InputError("bench measures the native engine: leave out engine='vllm'")
    return runtime.backend


def describe_machine(device: torch.device, found: Probe) -> dict[str, Any]:
    """The device and what was just measured on it, for a report."""
    from huoyan.version import __version__

    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "huoyan": __version__,
        "copy_bytes_per_s": found.copy,
        "matvec_bytes_per_s": found.matvec,
        "matmul_flops_per_s": found.matmul,
    }
