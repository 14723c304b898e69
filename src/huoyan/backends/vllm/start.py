"""Open a checkpoint with vLLM."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huoyan.backends.vllm.backend import Limits, VllmBackend
from huoyan.backends.vllm.client import Client
from huoyan.backends.vllm.installed import require_plugin, require_vllm
from huoyan.backends.vllm.interrupts import children_ignore_ctrl_c
from huoyan.backends.vllm.messages import is_refusal, one_line
from huoyan.backends.vllm.pictures import PictureInputs
from huoyan.backends.vllm.settings import check_known, engine_arguments, prepare_environment
from huoyan.errors import CapacityError, HuoyanError, InputError, ModelError

if TYPE_CHECKING:
    from huoyan.api.frontend import CheckpointFrontend
    from huoyan.api.options import EngineOptions
    from huoyan.models.config import ModelConfig

logger = logging.getLogger("huoyan")

_MEMORY_WORDS = ("KV cache", "out of memory", "Free memory on device", "No available memory")


def open_vllm(
    folder: Path, tokenizer_folder: Path, frontend: CheckpointFrontend, options: EngineOptions
) -> VllmBackend:
    """Start vLLM's engine on the checkpoint in `folder`.

    Raises:
        ModelError: vLLM cannot be imported, or cannot run the checkpoint.
        CapacityError: the machine is too small for it.
        InputError, UnsupportedError: an option that vLLM cannot follow, or vLLM is not installed.
    """
    from huoyan.models.checkpoint import open_checkpoint

    version = require_vllm()
    require_plugin()
    checkpoint = open_checkpoint(folder, need_weights=options.load_format != "dummy")
    prepare_environment(options.num_devices)
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine
    except Exception as error:
        # A broken installation fails in many ways, a missing library of CUDA among them.
        logger.debug("vLLM cannot be imported", exc_info=error)
        raise ModelError(
            f"vLLM {version} is installed and cannot be imported ({type(error).__name__}: {one_line(error)})"
        ) from error
    known = frozenset(field.name for field in dataclasses.fields(EngineArgs))
    check_known(options.vllm_options, known, version)
    arguments = engine_arguments(options, tokenizer_folder, checkpoint, current_platform.device_type)
    logger.info("starting vLLM %s on %s", version, current_platform.device_type)
    with children_ignore_ctrl_c():
        engine = _start(LLMEngine, EngineArgs, arguments, options.model)
    return over_engine(engine, folder, checkpoint.config, frontend, options.max_num_seqs)


def over_engine(
    engine: Any, folder: Path, model: ModelConfig, frontend: CheckpointFrontend, max_num_seqs: int
) -> VllmBackend:
    """A backend over vLLM's `LLMEngine`, which runs the checkpoint in `folder` already."""
    from huoyan.media.slicing import read_slice_rules

    pictures = PictureInputs(
        read_slice_rules(folder), engine.model_config.dtype, engine.renderer.mm_processor_cache
    )
    limits = Limits(model.text.vocab_size, model.query_num, engine.model_config.max_model_len, max_num_seqs)
    return VllmBackend(
        Client(engine, pictures),
        limits,
        eos_token_id=frontend.tokenizer.eos_token_id,
        stop_token_ids=frontend.stop_token_ids,
        tokenizer=frontend.tokenizer,
    )


def _start(engine_class: Any, arguments_class: Any, arguments: dict[str, Any], name: str) -> Any:
    try:
        return engine_class.from_engine_args(arguments_class(**arguments))
    except Exception as error:
        logger.debug("vLLM does not start", exc_info=error)
        raise _start_error(error, name) from error


def _start_error(error: Exception, name: str) -> HuoyanError:
    words = one_line(error)
    if type(error).__name__ == "OutOfMemoryError" or any(part in words for part in _MEMORY_WORDS):
        return CapacityError(f"vLLM cannot load {name}: {words}")
    if "ngine core initialization failed" in words:
        return ModelError(f"vLLM cannot load {name}: what its engine process printed above says why")
    if is_refusal(error):
        return InputError(f"vLLM refuses to load {name}: {words}")
    return ModelError(f"vLLM cannot load {name} ({type(error).__name__}: {words})")
