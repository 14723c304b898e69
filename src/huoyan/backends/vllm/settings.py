"""From `EngineOptions` to vLLM's own arguments and environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huoyan.engine.sizing import CPU_KV_VARIABLE, total_memory
from huoyan.errors import InputError, UnsupportedError
from huoyan.planning.sizes import GIB, MIB

if TYPE_CHECKING:
    from huoyan.api.options import EngineOptions
    from huoyan.models.checkpoint import Checkpoint

MAX_GPU_MEMORY = 0.95
"""vLLM counts neither CUDA itself nor graphs among what it may use, and refuses to start without room for them."""

_ENVIRONMENT = {
    # Answers go to standard output, and nothing else does.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # No network unless asked.
    "VLLM_NO_USAGE_STATS": "1",
    # On a CPU vLLM would round the activations of int4 layers to 8 bits.
    "VLLM_CPU_INT4_W4A8": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare_environment(processes: int = 1) -> None:
    """Set what vLLM reads from the environment when it is imported; what is set already stays.

    `processes`: those that share the model.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if processes > _numa_nodes():
        # On a CPU vLLM wants a NUMA node for each, unless it is told to bind no threads.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(_cpu_cache_gib())


def engine_arguments(
    options: EngineOptions, tokenizer_folder: Path, checkpoint: Checkpoint, device: str
) -> dict[str, Any]:
    """The keyword arguments of vLLM's `EngineArgs`.

    Args:
        device: what the installed vLLM runs on (`cuda`, `cpu`, …).

    Raises:
        InputError, UnsupportedError: an option that vLLM, or the one that is installed, cannot follow.
    """
    _check_device(options.device, device)
    if options.gpu_memory is not None:
        raise UnsupportedError(
            "gpu_memory is the native engine's: with engine='vllm' give gpu_memory_utilization, a fraction of the "
            f"card, or on a CPU ${CPU_KV_VARIABLE}"
        )
    on_cpu = device == "cpu"
    if on_cpu and options.pipeline_parallel_size > 1 and options.enforce_eager:
        raise UnsupportedError(
            "pipeline_parallel_size with enforce_eager on a CPU: vLLM leaves out there what the second process "
            "needs, and dies at the first request; leave enforce_eager out"
        )
    dtype = options.dtype
    # vLLM's own choice would be the checkpoint's; int4 it computes in 16 bits alone.
    if dtype == "auto" and on_cpu and checkpoint.config.quantization is None:
        from torch import device as torch_device

        from huoyan.models.weights import resolve_dtype

        dtype = str(resolve_dtype("auto", checkpoint, torch_device("cpu"))).removeprefix("torch.")
    arguments: dict[str, Any] = {
        "model": str(checkpoint.folder),
        "tokenizer": str(tokenizer_folder),
        "dtype": dtype,
        "seed": options.seed,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "gpu_memory_utilization": min(options.gpu_memory_utilization, MAX_GPU_MEMORY),
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "enable_prefix_caching": options.enable_prefix_caching,
        "enforce_eager": options.enforce_eager,
        "quantization": options.quantization,
        "load_format": options.load_format,
        # Frames of a video are pictures here; what a request may have is checked before it comes here.
        "limit_mm_per_prompt": {"video": 0},
        "max_logprobs": -1,
        # The library and the grammars of the native engine.
        "structured_outputs_config": {"backend": "guidance"},
        "disable_log_stats": True,
        # On a CPU the cache has a fixed size, and nothing is learnt from a trial run.
        "skip_mm_profiling": on_cpu,
        **options.vllm_options,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def check_known(given: Mapping[str, Any], known: frozenset[str], version: str) -> None:
    """Raise UnsupportedError for options that the installed vLLM has not."""
    for name in given:
        if name not in known:
            raise UnsupportedError(f"vLLM {version} has no option {name!r}: leave it out")


def _check_device(asked: str, device: str) -> None:
    kind, _, index = asked.partition(":")
    if kind == "auto":
        return
    if kind != device:
        raise InputError(f"device {asked!r}: the installed vLLM runs on {device}; use device='auto'")
    if index:
        raise InputError(
            f"device {asked!r}: vLLM takes the first cards it sees; set CUDA_VISIBLE_DEVICES={index} instead"
        )


def _numa_nodes() -> int:
    return sum(1 for _ in Path("/sys/devices/system/node").glob("node[0-9]*")) or 1


def _cpu_cache_gib() -> int:
    """Whole GiB of KV cache on a CPU, which is what vLLM can be told."""
    variable = os.environ.get(CPU_KV_VARIABLE, "")
    if variable.isdigit() and int(variable):
        return -(-int(variable) * MIB // GIB)
    return max(1, min(4, total_memory() // 4 // GIB))
