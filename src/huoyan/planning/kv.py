"""Bytes of the KV cache by the dtype it is kept in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from huoyan.errors import InputError

if TYPE_CHECKING:
    from huoyan.models.config import TextConfig

KV_DTYPES = ("auto", "int8", "fp8")
_SCALE = 2
"""Bytes of the scale that 8-bit values of a head and token share."""


def kv_bytes_per_token(text: TextConfig, itemsize: int, kv_dtype: str = "auto") -> int:
    """Keys and values of one token over all layers; `itemsize` is the model's, which "auto" keeps.

    Raises:
        InputError: an unknown dtype.
    """
    if kv_dtype not in KV_DTYPES:
        raise InputError(f"kv_cache_dtype {kv_dtype!r} is unknown: use one of {', '.join(KV_DTYPES)}")
    head = text.head_dim * itemsize if kv_dtype == "auto" else text.head_dim + _SCALE
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head
