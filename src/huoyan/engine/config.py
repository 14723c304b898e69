"""How large the engine is: what one may ask for, and what it comes to on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.errors import CapacityError, InputError

if TYPE_CHECKING:
    import torch

    from huoyan.models.config import ModelConfig

MIB = 1 << 20
GIB = 1 << 30
CPU_KV_VARIABLE = "HUOYAN_CPU_KV_MB"


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
    """On a GPU: the part of its memory that weights, cache and workspace may take together."""
    max_num_seqs: int = 128
    """Sequences that run at once (a beam search counts its width)."""
    max_num_batched_tokens: int = 2048
    """Tokens a step computes at most; longer prompts are computed in chunks."""
    max_encoder_slices: int = 32
    """Picture slices encoded at once."""
    picture_cache_bytes: int = 256 * MIB
    """Embeddings of recent pictures that are kept."""
    enable_prefix_caching: bool = True
    """Keep computed blocks for later requests that begin alike."""
    enforce_eager: bool = False
    """No CUDA graphs: each kernel of a decode step is launched by the host."""
    run_ahead: bool | None = None
    """Launch a step before the host has seen the tokens of the one before. None: where the device runs beside
    the host and our kernels serve it."""
    seed: int = 0
    """For requests without a seed of their own."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_encoder_slices"):
            _at_least_one(name, getattr(self, name))
        for name in ("max_model_len", "num_blocks", "kv_cache_bytes"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}: give a part, above 0 and up to 1"
            )
        if self.picture_cache_bytes < 0:
            raise InputError(f"picture_cache_bytes is {self.picture_cache_bytes}: use 0 to keep nothing")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InputError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running sequence decodes one token a step"
            )


@dataclass(frozen=True)
class CacheSize:
    """What it comes to."""

    max_model_len: int
    num_blocks: int
    bytes_per_block: int

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block


def size_cache(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> CacheSize:
    """Choose the context and the number of blocks. The weights must be on the device already.

    Raises:
        InputError: a longer context than the checkpoint's.
        CapacityError: the memory does not hold the context that was asked for, or no context at all.
    """
    from huoyan.engine.kv_cache import KVCache

    text = model.text
    limit = text.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise InputError(
            f"max_model_len is {config.max_model_len}, but the checkpoint was made for {limit} tokens"
        )
    max_model_len = config.max_model_len or limit
    bytes_per_block = KVCache.bytes_per_block(
        text.num_hidden_layers, config.block_size, text.num_key_value_heads, text.head_dim, dtype
    )
    # More than every sequence at full length could never be used.
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    if config.num_blocks is not None:
        num_blocks, source = config.num_blocks, f"num_blocks={config.num_blocks}"
    else:
        context_bytes = -(-max_model_len // config.block_size) * bytes_per_block
        memory, source = _cache_memory(config, model, dtype, device, context_bytes)
        num_blocks = min(memory // bytes_per_block, useful)
    holds = max(num_blocks, 0) * config.block_size
    if holds < max_model_len and (config.max_model_len is not None or holds < config.block_size):
        raise CapacityError(
            f"the KV cache ({source}) holds {holds} tokens, but max_model_len is {max_model_len} "
            f"({-(-max_model_len * bytes_per_block // config.block_size // MIB)} MiB): "
            f"lower max_model_len or give it more memory"
        )
    return CacheSize(min(max_model_len, holds), num_blocks, bytes_per_block)


def _cache_memory(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, context_bytes: int
) -> tuple[int, str]:
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes, f"kv_cache_bytes={config.kv_cache_bytes}"
    if device.type == "cuda":
        return _cuda_memory(config, model, dtype, device)
    variable = os.environ.get(CPU_KV_VARIABLE)
    if variable is not None:
        if not variable.isdigit() or int(variable) == 0:
            raise InputError(f"{CPU_KV_VARIABLE} is {variable!r}: give a whole number of megabytes")
        return int(variable) * MIB, f"{CPU_KV_VARIABLE}={variable}"
    # Untouched pages cost nothing, so this bounds what a long run may grow to, not what a short one takes.
    wanted = max(GIB, 2 * context_bytes)
    return min(total_memory() // 4, wanted), f"{CPU_KV_VARIABLE} is not set: at most a quarter of the memory"


def _cuda_memory(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[int, str]:
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * config.gpu_memory_utilization)
    used = total - free
    memory = allowed - used - workspace_bytes(config, model, dtype)
    source = (
        f"gpu_memory_utilization={config.gpu_memory_utilization} of {total / GIB:.1f} GiB, "
        f"{used / GIB:.1f} GiB in use"
    )
    return max(memory, 0), source


def workspace_bytes(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """What a step takes beside weights and cache, at most: activations, logits, encoder, picture cache."""
    from huoyan.engine.encoder_graph import MOST_PATCHES
    from huoyan.kernels import picture_kernels_enabled

    text, vision = model.text, model.vision
    wide = 3 * text.intermediate_size + 6 * text.hidden_size
    decoder = config.max_num_batched_tokens * wide * dtype.itemsize
    logits = 4 * config.max_num_seqs * text.vocab_size * 4
    # A slice covers about scale_resolution², some 1024 patches of 14².
    patches = config.max_encoder_slices * 1100
    encoder = patches * (2 * vision.intermediate_size + 8 * vision.hidden_size) * dtype.itemsize
    if picture_kernels_enabled():
        # Streams do not share what they have freed, so an encoder beside decodes takes its own, and its graphs too.
        captured = 0 if config.enforce_eager else min(MOST_PATCHES, patches)
        step = decoder + logits + encoder + encoder * captured // patches
    else:
        step = max(decoder + logits, encoder)
    return step + config.picture_cache_bytes + 256 * MIB


def total_memory() -> int:
    """Bytes of main memory that this process may use (a container's limit counts)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                limit = file.read().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} is {value}: it must be at least 1")
