"""Kernels to be compiled: here and now, or as a line of text, by which another process comes to the same kernel."""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Job = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments, its options."""


def compiled(job: Job) -> Any:
    """Triton's compiled kernel, from its cache or for it, not loaded yet."""
    kernel, arguments, options = job
    return kernel.warmup(*arguments, grid=(1, 1, 1), **options)


def write_job(job: Job) -> str | None:
    """None where it cannot be said in text."""
    kernel, arguments, options = job
    written = [_written(argument) for argument in arguments]
    if None in written or not all(map(_is_plain, options.values())):
        return None
    return json.dumps([kernel.fn.__module__, kernel.fn.__name__, written, options])


def read_job(line: str) -> Job:
    """Arguments that are compiled alike; tensors are on the CPU. Raises ImportError, AttributeError or ValueError where
    it was not written by `write_job` of this version."""
    module, name, written, options = json.loads(line)
    if not module.startswith("huoyan.kernels."):
        raise ValueError(f"{module} is none of our kernels")
    return getattr(importlib.import_module(module), name), tuple(map(_read, written)), options


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _written(argument: Any) -> list[Any] | None:
    if isinstance(argument, Tensor):
        return ["tensor", _name(argument.dtype), argument.data_ptr() % 16 == 0]
    if isinstance(argument, TensorDescriptor):
        sizes = (argument.shape, argument.strides, argument.block_shape)
        return ["described", _name(argument.base.dtype), *map(list, sizes)]
    return ["value", argument] if _is_plain(argument) else None


def _read(written: list[Any]) -> Any:
    kind, *rest = written
    if kind == "value":
        return rest[0]
    memory = torch.zeros(64, dtype=getattr(torch, rest[0]))
    if kind == "described":
        return TensorDescriptor(memory, *rest[1:])
    return memory if rest[1] else memory[1:]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
