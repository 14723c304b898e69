"""The header of a safetensors file: names, dtypes and shapes, without the tensors.

Format: 8 bytes little-endian length, that many bytes of JSON, then the data
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from huoyan.errors import ModelError

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one file, checked against the file's size.

    Raises:
        ModelError: the file is missing, cut short, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ModelError(
                    f"{path} is incomplete or not a safetensors file ({size} bytes): download it again"
                )
            text = file.read(length)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the download is incomplete; download it again") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    tensors, end = parse_header(text, path)
    if size != 8 + length + end:
        raise ModelError(
            f"{path} has {size} bytes where its header promises {8 + length + end}: download it again"
        )
    return tensors


def parse_header(text: bytes, path: Path) -> tuple[list[TensorInfo], int]:
    """The tensors a header names, and the length in bytes of the data behind it."""
    try:
        raw = json.loads(text)
        end = 0
        tensors = []
        for name, entry in raw.items():
            if name == "__metadata__":
                continue
            info = TensorInfo(name, path, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            start, stop = entry["data_offsets"]
            if stop - start != info.nbytes:
                raise ValueError(f"{name} has {stop - start} bytes for shape {list(info.shape)}")
            tensors.append(info)
            end = max(end, int(stop))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has a damaged header ({error}): download it again") from None
    return tensors, end
