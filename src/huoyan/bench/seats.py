"""How many seats an engine needs that is to hold as many sequences as its memory does, and no more than those."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from huoyan.bench.opened import folder_of

DEFAULT = 256
"""Where nothing is told that memory could be counted from."""
_STEP = 16
_MOST = 1024


def seats_for(model: str, length: int, options: dict[str, Any]) -> dict[str, Any]:
    """`options` of `LLM`; where they leave `max_num_seqs` open, as many as have room at `length` tokens each.

    Raises:
        HuoyanError: the model cannot be opened.
    """
    if options.get("max_num_seqs") is not None:
        return options
    return {**options, "max_num_seqs": _count(model, length, options)}


def _count(model: str, length: int, options: dict[str, Any]) -> int:
    import torch

    from huoyan.api.loading import engine_config, pick_device
    from huoyan.api.options import parse_options
    from huoyan.engine.sizing import way_before_loading
    from huoyan.models.checkpoint import open_checkpoint
    from huoyan.models.hub import resolve_model
    from huoyan.planning.memory import memory
    from huoyan.planning.shapes import published_shapes

    given = {name: value for name, value in options.items() if name != "load_format"}
    with folder_of(model, options.get("load_format") or "auto") as (name, how):
        where = resolve_model(name, **{key: options[key] for key in ("hub", "revision") if key in options})
        parsed = parse_options(str(where), {**given, "load_format": how, "max_num_seqs": DEFAULT})
        device = torch.device(pick_device(parsed.device))
        budget = parsed.gpu_memory_bytes
        if budget is None and device.type == "cuda":
            budget = int(torch.cuda.mem_get_info(device)[1] * parsed.gpu_memory_utilization)
        if budget is None:
            return DEFAULT
        checkpoint = open_checkpoint(where, need_weights=how != "dummy")
        shapes = {tensor: info.shape for tensor, info in checkpoint.tensors.items()}
        shapes = shapes or published_shapes(checkpoint.config)
        config = engine_config(where, parsed)
        way, weights = way_before_loading(config, checkpoint, device, parsed.dtype, dummy=how == "dummy")
        for seats in range(_STEP, _MOST + 1, _STEP):
            config = replace(config, max_num_seqs=seats)
            parts = memory(checkpoint.config, config, way, shapes, int4=weights.int4 or None)
            context = min(length, config.max_model_len or length)
            if parts.blocks_in(budget) // -(-context // config.block_size) <= seats:
                return seats
    return _MOST
