"""The vocabulary's tables in eight bits, as `huoyan quantize --quantize-head int8` writes them.

`weight` int8 [rows, width] beside `weight_scale` [rows] or [rows, 1]: what compressed-tensors calls int-quantized,
symmetric, a scale a channel. Only these two tables may be so; other linear maps in eight bits are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from huoyan.errors import ModelError
from huoyan.layers.int8 import Int8Embedding, Int8Linear, Int8Weight
from huoyan.models.minicpmv import MiniCPMV

HEAD = "llm.lm_head"
EMBEDDING = "llm.model.embed_tokens"
TABLES = (HEAD, EMBEDDING)
CONFIG_KEY = "huoyan_vocabulary"
"""In `quantization_config`: "int8" where the tables are, for those who read sizes from the config alone."""


def int8_tables(dtypes: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Which tables are in eight bits, each with its two tensors; `dtypes` are as safetensors calls them.

    Raises:
        ModelError: integers without their scales.
    """
    found = {}
    for table in TABLES:
        if dtypes.get(f"{table}.weight") == "I8":
            if f"{table}.weight_scale" not in dtypes:
                raise ModelError(
                    f"{table}.weight is int8 and comes without weight_scale: download the checkpoint again"
                )
            found[table] = (f"{table}.weight", f"{table}.weight_scale")
    return found


def read_int8(read: Callable[[str], Tensor], parts: tuple[str, str], shape: tuple[int, ...]) -> Int8Weight:
    """One table of `shape` (rows, width).

    Raises:
        ModelError: other sizes.
    """
    q, scales = (read(part) for part in parts)
    if tuple(q.shape) != shape or scales.shape not in ((shape[0],), (shape[0], 1)):
        raise ModelError(
            f"{parts[0]} has shape {list(q.shape)} with scales {list(scales.shape)} where config.json implies "
            f"{list(shape)} with {[shape[0]]}: config.json and the weights are not of the same model"
        )
    return Int8Weight(q.clone(), scales.flatten().float())


def put_tables(model: MiniCPMV, tables: Mapping[str, Int8Weight], dtype: torch.dtype, tied: bool) -> None:
    """Set the tables in; a head that is tied to an int8 embedding shares its bytes."""
    if EMBEDDING in tables:
        _replace(model, EMBEDDING, Int8Embedding(tables[EMBEDDING], dtype))
    if HEAD in tables or (tied and EMBEDDING in tables):
        _replace(model, HEAD, Int8Linear(tables[EMBEDDING if tied else HEAD]))


def _replace(model: MiniCPMV, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def random_table(rows: int, width: int, deviation: float, generator: torch.Generator) -> Int8Weight:
    """Integers as a normal distribution of this deviation would leave them, to measure speed with."""
    device = generator.device
    q = torch.empty(rows, width, dtype=torch.int8, device=device)
    for start in range(0, rows, 8192):
        part = q[start : start + 8192]
        part.copy_(torch.randn(part.shape, generator=generator, device=device).mul_(32).clamp_(-127, 127))
    return Int8Weight(q, torch.full((rows,), deviation / 32, device=device))
