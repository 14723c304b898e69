"""What the options of an engine come to on this machine: context, blocks, and how much is encoded at once."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.engine.driver_limits import stack_limit_is_low
from huoyan.engine.kv_format import KV_CACHE_DTYPES, kv_bytes_per_token
from huoyan.errors import CapacityError, InputError
from huoyan.planning.advice import what_fits
from huoyan.planning.budget import Budget, CardState, card_budget, host_budget
from huoyan.planning.driver import context_bytes
from huoyan.planning.memory import (
    graph_bytes,
    graph_driver_bytes,
    limits_of,
    picture_bytes,
    slack_bytes,
    way_of,
)
from huoyan.planning.shapes import published_shapes
from huoyan.planning.sizes import GIB, MIB, gib
from huoyan.planning.weights import Weights, table_bytes
from huoyan.planning.weights import weights as bytes_of_weights
from huoyan.planning.workspace import Limits, Way, workspace

if TYPE_CHECKING:
    import torch

    from huoyan.engine.config import EngineConfig
    from huoyan.models.checkpoint import Checkpoint
    from huoyan.models.config import ModelConfig
    from huoyan.models.minicpmv import MiniCPMV

log = logging.getLogger("huoyan")
CPU_KV_VARIABLE = "HUOYAN_CPU_KV_MB"


@dataclass(frozen=True)
class CacheSize:
    """What it comes to."""

    max_model_len: int
    num_blocks: int
    bytes_per_block: int
    limits: Limits
    """What a step holds at most."""
    torch_bytes: int | None = None
    """Where torch's allocator is to stop; None where nothing was told."""

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block


def size_cache(config: EngineConfig, model: MiniCPMV) -> CacheSize:
    """Choose the context and the number of blocks for a model that lies on its device already.

    Raises:
        InputError: a longer context than the checkpoint's.
        CapacityError: the memory does not hold the context that was asked for, or no context at all; the line
            says what would fit.
    """
    sizes = model.config
    limit = sizes.text.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise InputError(
            f"max_model_len is {config.max_model_len}, but the checkpoint was made for {limit} tokens"
        )
    way = way_of_model(model, config)
    limits = limits_of(sizes, config, way)
    bytes_per_block = config.block_size * kv_bytes_per_token(
        sizes.text, model.dtype.itemsize, config.kv_cache_dtype
    )
    # More than every sequence at full length could never be used.
    blocks_a_context = -(-limits.context // config.block_size)
    useful = config.max_num_seqs * blocks_a_context
    budget = _budget(config, model, way, limits)
    if config.num_blocks is not None:
        num_blocks, source = config.num_blocks, f"num_blocks={config.num_blocks}"
    elif config.kv_cache_bytes is not None:
        num_blocks, source = (
            config.kv_cache_bytes // bytes_per_block,
            f"kv_cache_bytes={config.kv_cache_bytes}",
        )
    elif budget is not None:
        num_blocks, source = budget.kv // bytes_per_block, budget.source
    else:
        memory, source = host_memory(blocks_a_context * bytes_per_block)
        num_blocks = memory // bytes_per_block
    if budget is not None and num_blocks * bytes_per_block > budget.kv:
        raise CapacityError(
            f"a KV cache of {gib(num_blocks * bytes_per_block)} ({source}) does not fit ({budget.source})"
        )
    num_blocks = max(min(num_blocks, useful) if config.num_blocks is None else num_blocks, 0)
    holds = num_blocks * config.block_size
    if holds < limits.context and (config.max_model_len is not None or holds < config.block_size):
        wanted = blocks_a_context * bytes_per_block
        message = (
            f"the KV cache ({source}) holds {holds} tokens, but max_model_len is {limits.context} "
            f"({gib(wanted)}): "
        )
        if budget is None or config.num_blocks or config.kv_cache_bytes:
            raise CapacityError(message + "lower max_model_len or give it more memory")
        fits = what_fits(sizes, config, way, budget.allowed, int4=way.int4 is not None)
        raise CapacityError(message + fits)
    if holds < limits.context:
        log.warning(
            "the context is %d tokens, not the checkpoint's %d: that is what the memory holds (%s); "
            "max_model_len sets it, int4 or more memory raises it",
            holds,
            limits.context,
            source,
        )
    torch_bytes = None
    if budget is not None:
        torch_bytes = budget.torch - max(budget.kv, 0) + num_blocks * bytes_per_block
    return CacheSize(min(limits.context, holds), num_blocks, bytes_per_block, limits, torch_bytes)


def way_of_model(model: MiniCPMV, config: EngineConfig) -> Way:
    """How this model is computed where it lies."""
    import torch

    from huoyan.engine.runner import has_fused_attention
    from huoyan.layers.int4 import Int4Linear

    kernels = has_fused_attention(model, KV_CACHE_DTYPES[config.kv_cache_dtype])
    packings = {module.packing for module in model.modules() if isinstance(module, Int4Linear)}
    return Way(
        itemsize=model.dtype.itemsize,
        cuda=model.device.type == "cuda",
        kernels=kernels,
        # Of several the one that takes the most.
        int4=next((name for name in ("bytes", "words", "cpu") if name in packings), None),
        kv8=config.kv_cache_dtype != "auto",
        threads=torch.get_num_threads(),
    )


def beside_weights(config: EngineConfig, sizes: ModelConfig, way: Way, limits: Limits) -> tuple[int, int]:
    """(bytes of everything but weights, KV cache and context, how many of them the driver takes)."""
    space = workspace(sizes, way, limits)
    graphs = graph_bytes(sizes, config, way, limits)
    pictures = picture_bytes(sizes, config, way)
    beside = space.total + pictures + graphs + slack_bytes(way, space, pictures)
    return beside, graph_driver_bytes(way, limits) if graphs else 0


def _budget(config: EngineConfig, model: MiniCPMV, way: Way, limits: Limits) -> Budget | None:
    """None where nobody told how much: on a CPU without `gpu_memory`, and on other devices."""
    beside, driver = beside_weights(config, model.config, way, limits)
    if model.device.type == "cuda":
        context = context_bytes(stack_limit_is_low(model.device))
        state = card_state(model.device)
        # Made when they are first used, after this.
        beside += table_bytes(model.config, model.dtype.itemsize)
        return card_budget(state, config.gpu_memory_utilization, config.gpu_memory, beside, driver, context)
    if config.gpu_memory is not None:
        return host_budget(config.gpu_memory, tensor_bytes(model), beside)
    return None


def card_state(device: torch.device) -> CardState:
    """A CUDA device as it is, after what torch only keeps for later was given back."""
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return CardState(total, free, torch.cuda.memory_reserved(device))


def tensor_bytes(model: MiniCPMV) -> int:
    """Bytes of a model's tensors, each storage counted once, with the tables it makes when first used."""
    from huoyan.layers.linear import Linear

    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    reordered = sum(
        module.reordered.numel() * module.reordered.element_size()
        for module in model.modules()
        if isinstance(module, Linear) and module.reordered is not None
    )
    return sum(storages.values()) + reordered + table_bytes(model.config, model.dtype.itemsize)


def check_before_loading(
    config: EngineConfig, checkpoint: Checkpoint, device: torch.device, dtype: str, *, dummy: bool = False
) -> None:
    """Refuse weights that cannot fit before gigabytes of them are read.

    Raises:
        CapacityError: they are too many for what the engine was told; the line says what would fit.
    """
    if device.type != "cuda" and config.gpu_memory is None:
        return
    sizes = checkpoint.config
    way, found = way_before_loading(config, checkpoint, device, dtype, dummy=dummy)
    weights = found.total
    beside, _ = beside_weights(config, sizes, way, limits_of(sizes, config, way))
    if device.type == "cuda":
        budget = card_budget(card_state(device), config.gpu_memory_utilization, config.gpu_memory, beside)
    else:
        assert config.gpu_memory is not None
        budget = host_budget(config.gpu_memory, 0, beside)
    block = config.block_size * kv_bytes_per_token(sizes.text, way.itemsize, config.kv_cache_dtype)
    if budget.kv - weights >= block:
        # Loading int4 takes more than its weights for a moment, in place of the cache that is not there yet.
        limit_torch(budget.torch, device)
        return
    fits = what_fits(sizes, config, way, budget.allowed, int4=way.int4 is not None)
    raise CapacityError(
        f"{gib(weights)} of weights and {gib(beside)} to work in do not fit ({budget.source}): {fits}"
    )


def way_before_loading(
    config: EngineConfig, checkpoint: Checkpoint, device: torch.device, dtype: str, *, dummy: bool = False
) -> tuple[Way, Weights]:
    """How a checkpoint's model will be computed, and its weights' bytes; `dummy`: weights are to be made up."""
    from huoyan.engine.runner import fuses_attention
    from huoyan.models.weights import resolve_dtype

    sizes = checkpoint.config
    wanted = resolve_dtype(dtype, checkpoint, device)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    awq = (sizes.quantization or {}).get("quant_method") == "awq"
    found = bytes_of_weights(
        sizes, shapes or published_shapes(sizes), wanted.itemsize, int4=True if dummy and awq else None
    )
    kernels = fuses_attention(device, wanted, sizes.text.head_dim, KV_CACHE_DTYPES[config.kv_cache_dtype])
    kv8 = config.kv_cache_dtype != "auto"
    way = Way(itemsize=wanted.itemsize, cuda=device.type == "cuda", kernels=kernels, kv8=kv8)
    return way_of(way, found), found


def limit_torch(nbytes: int | None, device: torch.device) -> None:
    """Have torch's allocator fail beyond so many bytes, rather than take them from a neighbour; None: no limit."""
    import torch

    if device.type != "cuda":
        return
    part = 1.0 if nbytes is None else min(nbytes / torch.cuda.mem_get_info(device)[1], 1.0)
    # This call alone among torch's wants a device with its number.
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(part, index)


def host_memory(context_bytes: int) -> tuple[int, str]:
    """(bytes for a KV cache in main memory, what they come from)."""
    variable = os.environ.get(CPU_KV_VARIABLE)
    if variable is not None:
        if not variable.isdigit() or int(variable) == 0:
            raise InputError(f"{CPU_KV_VARIABLE} is {variable!r}: give a whole number of megabytes")
        return int(variable) * MIB, f"{CPU_KV_VARIABLE}={variable}"
    # Untouched pages cost nothing, so this bounds what a long run may grow to, not what a short one takes.
    wanted = max(GIB, 2 * context_bytes)
    return min(total_memory() // 4, wanted), f"{CPU_KV_VARIABLE} is not set: at most a quarter of the memory"


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
