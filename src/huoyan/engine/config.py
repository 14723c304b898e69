"""How large the engine is: what one may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.engine.kv_format import KV_CACHE_DTYPES, unknown_kv_cache_dtype
from huoyan.errors import InputError
from huoyan.planning.sizes import MIB

if TYPE_CHECKING:
    from huoyan.engine.speculation import NgramSpeculation


@dataclass(frozen=True)
class EngineConfig:
    """What one may ask for. None leaves a size to the checkpoint and the machine."""

    max_model_len: int | None = None
    """Tokens of prompt and answer together; at most what the checkpoint was made for."""
    block_size: int = 16
    """Tokens in a block of the KV cache."""
    num_blocks: int | None = None
    """Blocks of the KV cache; overrides `kv_cache_bytes` and `gpu_memory_utilization`."""
    kv_cache_bytes: int | None = None
    """Bytes of the KV cache. On a CPU $HUOYAN_CPU_KV_MB, else 1 GiB or two full
    contexts, whichever is more, and at most a quarter of the memory."""
    gpu_memory_utilization: float = 0.9
    """On a GPU: the part of its memory that may be in use, by this and by other processes."""
    gpu_memory: int | None = None
    """Bytes that weights, cache, workspace and the CUDA context may take together, instead of a part of the
    card. On a CPU, too, no more is taken."""
    kv_cache_dtype: str = "auto"
    """auto keeps the model's dtype; int8, fp8 (fp8_e4m3) and fp8_e5m2 take half of it (see `kv_format`)."""
    speculation: NgramSpeculation | None = None
    """Guess tokens by prompt lookup and verify them; None for one token a step."""
    max_num_seqs: int = 128
    """Sequences that run at once (a beam search counts its width)."""
    max_num_batched_tokens: int = 2048
    """Tokens a step computes at most; longer prompts are computed in chunks."""
    max_encoder_slices: int = 32
    """Picture slices encoded at once."""
    max_slice_patches: int = 8 * 32 * 32
    """Patches of one slice at most: what the media stage lets through of a strip (see `MAX_SLICE_GROWTH`)."""
    picture_cache_bytes: int = 32 * MIB
    """Embeddings of recent pictures that are kept, some 70 slices of the published model. A picture larger
    than that, and of more than 64 slices, is refused."""
    enable_prefix_caching: bool = True
    """Keep computed blocks for later requests that begin alike."""
    enforce_eager: bool = False
    """No CUDA graphs: each kernel of a decode step is launched by the host."""
    capture_at_start: bool = False
    """Capture all CUDA graphs before the first request, some seconds in all, and not when their sizes come again and
    again: for engines that are to serve many requests."""
    run_ahead: bool | None = None
    """Launch a step before the host has seen the tokens of the one before. None: where the device runs beside
    the host and our kernels serve it."""
    seed: int = 0
    """For requests without a seed of their own."""

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_encoder_slices",
            "max_slice_patches",
        ):
            _at_least_one(name, getattr(self, name))
        for name in ("max_model_len", "num_blocks", "kv_cache_bytes", "gpu_memory"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}: give a part, above 0 and up to 1"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise InputError(unknown_kv_cache_dtype(self.kv_cache_dtype))
        if self.picture_cache_bytes < 0:
            raise InputError(f"picture_cache_bytes is {self.picture_cache_bytes}: use 0 to keep nothing")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InputError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running sequence decodes one token a step"
            )


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} is {value}: it must be at least 1")
