"""Open a model: name to folder, folder to weights, weights to a backend, and the stages before it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huoyan.api.compiling import helper_for
from huoyan.api.runtime import Runtime
from huoyan.errors import CapacityError, InputError, ModelError

if TYPE_CHECKING:
    from huoyan.api.frontend import CheckpointFrontend
    from huoyan.api.options import EngineOptions
    from huoyan.backends.base import Backend
    from huoyan.engine.config import EngineConfig
    from huoyan.kernels.compile_helper import CompileHelper

Progress = Callable[[int, int], None]

logger = logging.getLogger("huoyan")


def load_runtime(options: EngineOptions) -> Runtime:
    """Find (or download) the model, load it and make it ready to answer.

    Raises:
        ModelError, CapacityError, InputError, UnsupportedError: one line that says what to do.
    """
    from huoyan.api.frontend import open_frontend

    _note_engine(options)
    folder = _resolve(options, options.model)
    if not (folder / "config.json").exists():
        raise ModelError(
            f"the folder {folder} holds no checkpoint (no config.json): give a checkpoint folder, a hub name "
            "such as openbmb/MiniCPM-V-2_6, or tiny"
        )
    tokenizer_folder = folder if options.tokenizer is None else _resolve(options, options.tokenizer)
    with helper_for(options, folder) as helper:
        frontend = open_frontend(folder, tokenizer_folder, options)
        backend = _open_backend(folder, tokenizer_folder, frontend, options, helper)
    return Runtime(backend=backend, frontend=frontend, folder=folder, options=options)


def _resolve(options: EngineOptions, name: str) -> Path:
    from huoyan.models.hub import resolve_model

    return resolve_model(name, hub=options.hub, revision=options.revision, cache_dir=options.download_dir)


def _note_engine(options: EngineOptions) -> None:
    """Where the choice was left open, say which engine runs, and why. Raises UnsupportedError without vLLM."""
    version = None
    if options.backend == "vllm":
        from huoyan.backends.vllm.installed import require_vllm

        version = require_vllm()
    if options.engine != "auto":
        return
    if version is None:
        sentence = "engine: native, since the model runs on one device"
    else:
        sentence = (
            f"engine: vLLM {version}, since {options.num_devices} devices are asked for in one model "
            f"(tensor_parallel_size={options.tensor_parallel_size}, "
            f"pipeline_parallel_size={options.pipeline_parallel_size}) and the native engine runs on one"
        )
    if sys.stderr.isatty():
        from huoyan.cli.console import dim

        dim(sentence)
    else:
        logger.info(sentence)


def _open_backend(
    folder: Path,
    tokenizer_folder: Path,
    frontend: CheckpointFrontend,
    options: EngineOptions,
    helper: CompileHelper | None,
) -> Backend:
    if options.backend == "vllm":
        from huoyan.backends.vllm.start import open_vllm

        return open_vllm(folder, tokenizer_folder, frontend, options)
    return _open_native(folder, frontend, options, helper)


def engine_config(folder: Path, options: EngineOptions) -> EngineConfig:
    """What the native engine is asked for, for the model in `folder`."""
    from huoyan.engine.config import EngineConfig
    from huoyan.engine.speculation import NgramSpeculation
    from huoyan.media.slicing import MAX_SLICE_GROWTH, read_slice_rules

    rules = read_slice_rules(folder)
    sizes: dict[str, Any] = {
        "max_model_len": options.max_model_len,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "gpu_memory": options.gpu_memory_bytes,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "max_slice_patches": MAX_SLICE_GROWTH * (rules.scale_resolution // rules.patch_size) ** 2,
        "enable_prefix_caching": options.enable_prefix_caching,
        "enforce_eager": options.enforce_eager,
        "capture_at_start": options.capture_at_start,
        "kv_cache_dtype": options.kv_cache_dtype,
        "speculation": NgramSpeculation.parse(options.speculative_config),
        "seed": options.seed,
    }
    return EngineConfig(**{name: value for name, value in sizes.items() if value is not None})


def _open_native(
    folder: Path, frontend: CheckpointFrontend, options: EngineOptions, helper: CompileHelper | None
) -> Backend:
    import torch

    from huoyan.engine.driver_limits import limit_cublas, lower_stack_limit
    from huoyan.engine.engine import Engine
    from huoyan.engine.segments import close_gaps, let_segments_grow
    from huoyan.engine.sizing import check_before_loading, limit_torch
    from huoyan.kernels import decode_kernels_enabled, first_use
    from huoyan.layers.linear import lay_out_for_cuda
    from huoyan.models.checkpoint import open_checkpoint
    from huoyan.models.weights import load_model

    device = pick_device(options.device)
    if torch.device(device).type == "cuda" and decode_kernels_enabled():
        first_use.prepare()
    dummy = options.load_format == "dummy"
    checkpoint = open_checkpoint(folder, need_weights=not dummy)
    config = engine_config(folder, options)
    tokenizer = frontend.tokenizer
    limit_cublas(torch.device(device))
    let_segments_grow(torch.device(device))
    lower_stack_limit(torch.device(device))
    check_before_loading(config, checkpoint, torch.device(device), options.dtype, dummy=dummy)
    try:
        with _loading_bar(checkpoint.nbytes, options.model) as progress:
            model = load_model(
                checkpoint,
                device=device,
                dtype=options.dtype,
                load_format="dummy" if dummy else "auto",
                seed=options.seed,
                progress=progress,
            )
        if decode_kernels_enabled() and not checkpoint.config.text.tie_word_embeddings:
            lay_out_for_cuda(model.llm.lm_head)
        close_gaps(model, torch.device(device))
        engine = Engine(
            model,
            config,
            eos_token_id=tokenizer.eos_token_id,
            stop_token_ids=frontend.stop_token_ids,
            tokenizer=tokenizer,
            helper=helper,
        )
        if engine.takes_originals:
            frontend.keep_originals()
        return engine
    except BaseException as error:
        limit_torch(None, torch.device(device))
        if not isinstance(error, torch.OutOfMemoryError):
            raise
        raise CapacityError(
            f"{options.model} ({checkpoint.nbytes / 2**30:.1f} GiB of weights) does not fit into the memory "
            f"of {device}: free some, or use the int4 checkpoint"
        ) from error


def pick_device(requested: str) -> str:
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        InputError: no such device here.
    """
    import torch

    mps = getattr(torch.backends, "mps", None)
    if requested == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if mps is not None and mps.is_available() else "cpu"
    kind, _, index = requested.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise InputError(f"device {requested!r} is unknown: use auto, cpu, cuda, cuda:1 or mps")
    if kind == "cuda":
        if not torch.cuda.is_available():
            why = "this torch has no CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
            raise InputError(f"device {requested!r}: {why}; use --device cpu, or see `huoyan env`")
        if index and int(index) >= torch.cuda.device_count():
            raise InputError(
                f"device {requested!r}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0"
            )
    if kind == "mps" and not (mps is not None and mps.is_available()):
        raise InputError("device 'mps': this machine has none; use --device cpu")
    return requested


@contextlib.contextmanager
def _loading_bar(total: int, name: str) -> Iterator[Progress | None]:
    """A bar on a terminal, for checkpoints that take a while."""
    if total < 200_000_000 or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    with Progress(
        TextColumn("Loading {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done, of: bar.update(task, completed=done, total=of)
