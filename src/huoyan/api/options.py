"""The keyword arguments of `LLM` and `AsyncLLM`: vLLM's names, checked once.

Each falls into one of three groups: it is used; it makes no difference here and is accepted; or it would
change the result and is refused with the reason and the way out.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from huoyan.engine.kv_format import KV_CACHE_DTYPES, unknown_kv_cache_dtype
from huoyan.engine.speculation import NgramSpeculation
from huoyan.errors import InputError, UnsupportedError
from huoyan.planning.sizes import parse_bytes

if TYPE_CHECKING:
    from huoyan.media.fetch import FetchPolicy

logger = logging.getLogger("huoyan")

DTYPES = ("auto", "float32", "float", "float16", "half", "bfloat16")
ENGINES = ("native", "vllm", "auto")
LOAD_FORMATS = ("auto", "safetensors", "dummy")


@dataclass(frozen=True)
class EngineOptions:
    """How to load a model and how much of the machine to give it (names and defaults of vLLM)."""

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    gpu_memory: str | int | None = None
    """What this process may take of the card ("24GiB"), in place of `gpu_memory_utilization`."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    seed: int = 0
    limit_mm_per_prompt: Mapping[str, int] | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    capture_at_start: bool = True
    """On CUDA: capture the graphs of all sizes before the first request (some seconds), or each when its size comes
    again and again."""
    quantization: str | None = None
    hub: str = "huggingface"
    revision: str | None = None
    download_dir: str | None = None
    load_format: str = "auto"
    kv_cache_dtype: str = "auto"
    """int8 or fp8 hold almost twice the tokens, nearly exactly; auto is the model's dtype, and exact."""
    speculative_config: Mapping[str, Any] | None = None
    """`{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}`."""
    engine: str = "native"
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Of every request: `max_slice_nums`, `use_image_id`, `max_frames`, `fps`."""
    allowed_local_media_path: str | None = None
    """Where set, pictures and videos are read only from inside this folder."""
    max_pixels: int | None = None
    """Pixels of one picture at most; None takes `$HUOYAN_MAX_PIXELS`, else the media stage's own limit."""
    fetch_policy: FetchPolicy | None = None
    """What may be read and fetched; a server sets one, a program on one's own machine has no need to."""
    vllm_options: Mapping[str, Any] = field(default_factory=dict)
    """What only vLLM reads, by its names (`VLLM_OPTIONS`); `LLM` takes each as a keyword of its own."""

    @property
    def num_devices(self) -> int:
        """Devices that one model is to be spread over."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def backend(self) -> str:
        """`native` or `vllm`: what `engine` comes to."""
        if self.engine == "auto":
            return "vllm" if self.num_devices > 1 else "native"
        return self.engine

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        if self.engine not in ENGINES:
            raise InputError(f"engine {self.engine!r} is unknown: use native, vllm or auto")
        if self.load_format not in LOAD_FORMATS:
            raise UnsupportedError(
                f"load_format {self.load_format!r}: huoyan reads safetensors only (auto, safetensors), "
                "or makes random weights up (dummy)"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise UnsupportedError(unknown_kv_cache_dtype(self.kv_cache_dtype))
        NgramSpeculation.parse(self.speculative_config)
        _at_least("tensor_parallel_size", self.tensor_parallel_size, 1)
        _at_least("pipeline_parallel_size", self.pipeline_parallel_size, 1)
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        if self.max_model_len is not None:
            _at_least("max_model_len", self.max_model_len, 1)
        if self.max_num_batched_tokens is not None:
            _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(
                f"gpu_memory_utilization is a fraction of the card, above 0 and up to 1 "
                f"(got {self.gpu_memory_utilization})"
            )
        if self.gpu_memory is not None:
            parse_bytes(self.gpu_memory, "gpu_memory")
        if self.quantization not in (None, "awq", "awq_marlin") and self.backend == "native":
            raise UnsupportedError(
                f"quantization {self.quantization!r}: huoyan runs AWQ int4 checkpoints, and reads from the "
                "files whether they are; leave it out"
            )
        for kind, limit in (self.limit_mm_per_prompt or {}).items():
            if kind not in ("image", "video", "audio"):
                raise InputError(f"limit_mm_per_prompt knows image and video, not {kind!r}")
            _at_least(f"limit_mm_per_prompt[{kind!r}]", limit, 0)
        if self.backend == "native":
            for name in ("tensor_parallel_size", "pipeline_parallel_size"):
                if getattr(self, name) > 1:
                    raise UnsupportedError(
                        f"{name}={getattr(self, name)}: the native engine runs on one device; "
                        "use engine='vllm', or one LLM a card"
                    )

    @property
    def gpu_memory_bytes(self) -> int | None:
        return None if self.gpu_memory is None else parse_bytes(self.gpu_memory, "gpu_memory")


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least} (got {value!r})")


_HARMLESS = frozenset(
    {
        "block_size",
        "compilation_config",
        "disable_custom_all_reduce",
        "disable_log_requests",
        "disable_log_stats",
        "disable_mm_preprocessor_cache",
        "distributed_executor_backend",
        "enable_chunked_prefill",
        "max_context_len_to_capture",
        "max_logprobs",
        "max_num_partial_prefills",
        "max_parallel_loading_workers",
        "max_seq_len_to_capture",
        "mm_processor_cache_gb",
        "num_gpu_blocks_override",
        "preemption_mode",
        "served_model_name",
        "swap_space",
        "use_v2_block_manager",
        "worker_use_ray",
    }
)
"""Options about how vLLM works inside, which cannot change an answer."""

VLLM_OPTIONS = frozenset(
    {
        "async_scheduling",
        "attention_backend",
        "attention_config",
        "block_size",
        "calculate_kv_scales",
        "compilation_config",
        "cpu_offload_gb",
        "cudagraph_capture_sizes",
        "disable_custom_all_reduce",
        "distributed_executor_backend",
        "enable_chunked_prefill",
        "hf_overrides",
        "kernel_config",
        "kv_cache_dtype",
        "kv_cache_memory_bytes",
        "max_cudagraph_capture_size",
        "max_logprobs",
        "max_parallel_loading_workers",
        "mm_encoder_attn_backend",
        "mm_encoder_tp_mode",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "num_gpu_blocks_override",
        "optimization_level",
        "performance_mode",
        "ray_workers_use_nsight",
        "speculative_config",
    }
)
"""What `engine="vllm"` hands on as it is. The native engine has no use for them, or refuses them as below."""

_ONLY_DEFAULT: dict[str, tuple[tuple[Any, ...], str]] = {
    "data_parallel_size": ((1,), "start one process a card, each with its own LLM"),
    "cpu_offload_gb": ((0, None), "weights stay on one device; an int4 checkpoint needs 7 GB"),
    "enable_lora": ((False, None), "LoRA adapters are not supported; merge the adapter into the checkpoint"),
    "speculative_model": (
        (None,),
        "there is no decoding with a second model; speculative_config has prompt lookup, "
        "{'method': 'ngram', 'num_speculative_tokens': 5}",
    ),
    "hf_overrides": ((None, {}), "sizes are read from the checkpoint; edit its config.json"),
    "rope_scaling": ((None, {}), "the model is run with the positions it was trained for"),
    "rope_theta": ((None,), "the model is run with the positions it was trained for"),
    "skip_tokenizer_init": ((False,), "placeholders of pictures need the tokenizer"),
    "tokenizer_mode": (("auto", "slow"), "the checkpoint's tokenizer.json is used"),
    "tokenizer_revision": ((None,), "set revision, which covers the tokenizer"),
    "task": (("auto", "generate", None), "huoyan generates text"),
    "runner": (("auto", "generate", None), "huoyan generates text"),
    "convert": (("auto", "none", None), "huoyan generates text"),
    "generation_config": (("auto", None), "the defaults come from the checkpoint's generation_config.json"),
    "override_generation_config": ((None, {}), "give SamplingParams instead"),
    "quantization_param_path": ((None,), "int4 is read from the checkpoint"),
}
"""Options that would change the result: the values that ask for nothing, and what to do instead."""


def parse_options(model: Any, keywords: Mapping[str, Any]) -> EngineOptions:
    """Check the keyword arguments of `LLM`.

    Raises:
        InputError: an unknown name, or a value out of its range.
        UnsupportedError: an option of vLLM that would change the result here.
    """
    known = {f.name for f in fields(EngineOptions)}
    used: dict[str, Any] = {}
    video_choices: dict[str, Any] = {}
    for_vllm: dict[str, Any] = {}
    given = {name: keywords[name] for name in _CHOOSING if name in keywords}
    runs_vllm = EngineOptions(model="", **given).backend == "vllm"
    _check_executor(keywords.get("distributed_executor_backend"))
    for name, value in keywords.items():
        if name == "media_io_kwargs":
            video_choices = _video_choices(value)
        elif name in VLLM_OPTIONS and runs_vllm:
            for_vllm[name] = value
        elif name in known and name != "vllm_options":
            used[name] = value
        elif name == "trust_remote_code":
            if value:
                _note_remote_code()
        elif name in _ONLY_DEFAULT:
            harmless, reason = _ONLY_DEFAULT[name]
            if value not in harmless:
                way_out = "; engine='vllm' has it" if name in VLLM_OPTIONS else ""
                raise UnsupportedError(f"{name}={value!r}: {reason}{way_out}")
        elif name in VLLM_OPTIONS - _HARMLESS:
            if value is not None:
                raise UnsupportedError(f"{name} is an option of vLLM: use it with engine='vllm'")
        elif name not in _HARMLESS:
            raise InputError(_unknown(name, known - {"vllm_options"}))
    if "dtype" in used:
        used["dtype"] = str(used["dtype"]).removeprefix("torch.")
    if "device" in used:
        used["device"] = str(used["device"])
    used["mm_processor_kwargs"] = {**video_choices, **(used.get("mm_processor_kwargs") or {})}
    return EngineOptions(model=_model_name(model), vllm_options=for_vllm, **used)


_CHOOSING = ("engine", "tensor_parallel_size", "pipeline_parallel_size")
"""What decides which engine runs."""


_EXECUTORS = ("mp", "ray", "uni", "external_launcher")


def _check_executor(asked: object) -> None:
    """vLLM takes what is none of its names for the path of a class, and says of `gloo` what unpacking it said."""
    if isinstance(asked, str) and asked not in _EXECUTORS and "." not in asked:
        raise InputError(
            f"distributed_executor_backend {asked!r} is unknown: use mp (processes of this machine) or "
            "ray (of several)"
        )


def _video_choices(value: Any) -> dict[str, Any]:
    """vLLM's `media_io_kwargs={"video": {"num_frames": 16}}`."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or set(value) - {"video", "image"} or value.get("image"):
        raise UnsupportedError("media_io_kwargs has {'video': {'num_frames': …, 'fps': …}} here")
    return dict(value.get("video") or {})


def _model_name(model: Any) -> str:
    import os

    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model must be a folder or a name, not {type(model).__name__}")
    return os.fspath(model)


def _unknown(name: str, known: set[str]) -> str:
    names = [*known, *_HARMLESS, *_ONLY_DEFAULT, *VLLM_OPTIONS, "trust_remote_code"]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"LLM has no option {name!r}" + (f": did you mean {close[0]!r}?" if close else "")


_noted_remote_code = False


def _note_remote_code() -> None:
    global _noted_remote_code
    if not _noted_remote_code:
        _noted_remote_code = True
        logger.info("trust_remote_code is accepted and not needed: no code of the checkpoint is run")
