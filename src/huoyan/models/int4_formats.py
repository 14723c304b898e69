"""Int4 weights as they are published, turned into one plain form. Which format a matrix has is decided by the
tensors that are there and their shapes, not by what `quantization_config` says.

* AutoAWQ "GEMM": `qweight` int32 [in, out/8], `qzeros` int32 [in/g, out/8], `scales` [in/g, out]; the nibbles
  of a word hold columns 0, 2, 4, 6, 1, 3, 5, 7 of its eight, lowest first.
* GPTQ: `qweight` int32 [in/8, out], `qzeros` int32 [in/g, out/8] (one less than the zero point, in its first
  format), `scales` [in/g, out], `g_idx` [in]; nibbles in order.
* compressed-tensors "pack-quantized": `weight_packed` int32 [out, in/8], `weight_scale` [out, in/g],
  `weight_zero_point` int32 [out/8, in/g] where asymmetric, `weight_shape`; values stored plus 8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from huoyan.errors import ModelError
from huoyan.layers.int4 import Int4Weight

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ_ORDER[k] is the column (of eight) in nibble k of a word."""

SUFFIXES = {
    "awq or gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    ),
}
_OTHERS = (
    ("bitsandbytes", re.compile(r"\.(SCB|absmax|quant_map|nested_absmax|quant_state\..*)$")),
    ("NVFP4", re.compile(r"\.(weight_global_scale|weight_scale_2)$")),
    ("HQQ", re.compile(r"\.(W_q|meta)$")),
    ("AQLM", re.compile(r"\.codebooks$")),
    ("GGUF", re.compile(r"\.qweight_type$")),
)
_OTHER_DTYPES = {
    "F8_E4M3": "FP8", "F8_E5M2": "FP8", "I8": "8-bit integers", "U8": "packed bytes",
    "F8_E8M0": "MXFP",
}  # fmt: skip
_WAY_OUT = "huoyan reads 16-bit weights and int4 as AutoAWQ, GPTQ and compressed-tensors write it"
Read = Callable[[str], Tensor]
"""Gives a tensor of the checkpoint by name; it is taken apart where it lies."""


def is_int4(name: str) -> bool:
    """Whether a tensor of this name holds the integers of an int4 matrix."""
    return name.endswith((".qweight", ".weight_packed"))


def refuse_other_formats(dtypes: Mapping[str, str], config: Mapping[str, Any] | None) -> None:
    """Name what a checkpoint is quantized with, where that is nothing we read.

    Args:
        dtypes: each tensor's, as safetensors calls it.
        config: `quantization_config`, only used to say more.

    Raises:
        ModelError: the format is another; the line names it and a tensor.
    """
    said = (config or {}).get("quant_method")
    more = f" (quantization_config: {said})" if isinstance(said, str) else ""
    for name in sorted(dtypes):
        for format_name, pattern in _OTHERS:
            if pattern.search(name):
                raise ModelError(f"{name} is of {format_name}{more}, which is not supported: {_WAY_OUT}")
    for name in sorted(dtypes):
        kind = _OTHER_DTYPES.get(dtypes[name])
        if kind and name.endswith((".weight", ".weight_packed", ".qweight")):
            raise ModelError(f"{name} holds {kind}{more}, which is not supported: {_WAY_OUT}")


def quantized_parts(names: set[str], matrix: str) -> tuple[str, ...]:
    """The tensors that hold `matrix` (its name without `.weight`) in int4; empty where it is not in int4."""
    if f"{matrix}.qweight" in names:
        suffixes = SUFFIXES["awq or gptq"]
    elif f"{matrix}.weight_packed" in names:
        suffixes = SUFFIXES["compressed-tensors"]
    else:
        return ()
    return tuple(f"{matrix}.{suffix}" for suffix in suffixes if f"{matrix}.{suffix}" in names)


def read_int4(
    read: Read, parts: tuple[str, ...], matrix: str, shape: tuple[int, int], config: Mapping[str, Any] | None
) -> Int4Weight:
    """Read one matrix of `shape` (out, in) from its published tensors.

    Raises:
        ModelError: a layout that is none of the three, by name.
    """
    has = {part.rpartition(".")[2]: part for part in parts}
    if "weight_packed" in has:
        return _compressed_tensors(read, has, matrix, shape)
    for needed in ("qzeros", "scales"):
        if needed not in has:
            raise ModelError(f"{matrix}.qweight comes without {needed}: download the checkpoint again")
    words = read(has["qweight"])
    rows, columns = shape
    if tuple(words.shape) == (columns, rows // 8):
        return _awq(words, read(has["qzeros"]), read(has["scales"]), matrix, shape)
    if tuple(words.shape) == (columns // 8, rows):
        order = read(has["g_idx"]) if "g_idx" in has else None
        return _gptq(words, read(has["qzeros"]), read(has["scales"]), order, matrix, shape, config)
    bits = 32 * words.numel() / (rows * columns)
    if bits != 4 and bits in (2, 3, 5, 6, 8):
        raise ModelError(f"{matrix}.qweight holds {bits:.0f}-bit values, which is not supported: {_WAY_OUT}")
    raise ModelError(
        f"{matrix}.qweight {list(words.shape)} is int4 of a {rows}x{columns} matrix neither as AutoAWQ "
        "(GEMM) nor as GPTQ writes it: quantize the model again with `huoyan quantize`"
    )


def unpack_nibbles(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 [..., n] -> uint8 [..., 8 n]; nibble k of a word is column order[k] of its eight."""
    shifts = torch.tensor([4 * order.index(column) for column in range(8)], dtype=torch.int32).to(
        words.device
    )
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(-2)


def pack_nibbles(q: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """uint8 [..., 8 n] -> int32 [..., n], the inverse of `unpack_nibbles`."""
    nibbles = q.unflatten(-1, (-1, 8))[..., list(order)].to(torch.int64)
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _awq(words: Tensor, zeros: Tensor, scales: Tensor, matrix: str, shape: tuple[int, int]) -> Int4Weight:
    rows, columns = shape
    _check_groups(matrix, "scales", scales, columns, rows)
    _check_groups(matrix, "qzeros", zeros, columns, rows // 8, groups=scales.shape[0])
    return Int4Weight(
        unpack_nibbles(words, AWQ_ORDER).T.contiguous(),
        scales.float().T.contiguous(),
        unpack_nibbles(zeros, AWQ_ORDER).float().T.contiguous(),
    )


def _gptq(
    words: Tensor,
    zeros: Tensor,
    scales: Tensor,
    order: Tensor | None,
    matrix: str,
    shape: tuple[int, int],
    config: Mapping[str, Any] | None,
) -> Int4Weight:
    rows, columns = shape
    _check_groups(matrix, "scales", scales, columns, rows)
    _check_groups(matrix, "qzeros", zeros, columns, rows // 8, groups=scales.shape[0])
    group = columns // scales.shape[0]
    if order is not None and not torch.equal(order.long().cpu(), torch.arange(columns) // group):
        raise ModelError(
            f"{matrix}.g_idx is out of order: GPTQ with desc_act (activation order) is not supported; "
            "use a checkpoint quantized with desc_act false"
        )
    stored_less_one = (config or {}).get("checkpoint_format", "gptq") != "gptq_v2"
    points = unpack_nibbles(zeros).float() + float(stored_less_one)
    return Int4Weight(unpack_nibbles(words.T), scales.float().T.contiguous(), points.T.contiguous())


def _compressed_tensors(read: Read, has: dict[str, str], matrix: str, shape: tuple[int, int]) -> Int4Weight:
    rows, columns = shape
    words = read(has["weight_packed"])
    if tuple(words.shape) != (rows, columns // 8):
        raise ModelError(
            f"{matrix}.weight_packed has shape {list(words.shape)} where int4 of {rows}x{columns} has "
            f"{[rows, columns // 8]}: other bit widths are not supported"
        )
    if "weight_g_idx" in has:
        raise ModelError(f"{matrix} is quantized in activation order (weight_g_idx), which is not supported")
    if "weight_scale" not in has:
        raise ModelError(f"{matrix}.weight_packed comes without weight_scale: download the checkpoint again")
    scales = read(has["weight_scale"]).float()
    _check_groups(matrix, "weight_scale", scales.T, columns, rows)
    if "weight_zero_point" in has:
        zeros = unpack_nibbles(read(has["weight_zero_point"]).T).T[:rows].float()
        if zeros.shape != scales.shape:
            raise ModelError(f"{matrix}.weight_zero_point does not fit its scales: download it again")
    else:
        zeros = torch.full_like(scales, 8.0)
    return Int4Weight(unpack_nibbles(words), scales, zeros.contiguous())


def _check_groups(
    matrix: str, name: str, value: Tensor, columns: int, width: int, groups: int | None = None
) -> None:
    found = tuple(value.shape)
    if len(found) != 2 or found[1] != width or columns % found[0] or (groups or found[0]) != found[0]:
        raise ModelError(
            f"{matrix}.{name} has shape {list(found)}, which does not divide {columns} inputs into groups of "
            f"{width}: download the checkpoint again"
        )
