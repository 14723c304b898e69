"""How a key or a value of one token and one head lies in the KV cache, and what that takes. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.errors import InputError

if TYPE_CHECKING:
    from huoyan.models.config import TextConfig

KV_CACHE_DTYPES = {
    "auto": "auto",
    "int8": "int8",
    "int8_per_token_head": "int8",
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_per_token_head": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
}
"""What `kv_cache_dtype` may be (vLLM's names, and int8), and what it means here."""
SCALE_BYTES = 2
"""Scales are float16."""
_INT8_GROUP = 32


@dataclass(frozen=True)
class KVFormat:
    """The numbers of one token and head: `head_dim` of them, and their scales."""

    name: str
    """auto, int8, fp8_e4m3 or fp8_e5m2"""
    head_dim: int
    group: int
    """Neighbours that share a scale; 0 where there are no scales."""

    @property
    def scales(self) -> int:
        """Scales of one token and head."""
        return self.head_dim // self.group if self.group else 0

    def bytes_per_head(self, itemsize: int) -> int:
        """Bytes of a key (or a value) of one token and head; `itemsize`: of the model's dtype."""
        return self.head_dim + SCALE_BYTES * self.scales if self.group else self.head_dim * itemsize


def kv_format(kv_cache_dtype: str, head_dim: int) -> KVFormat:
    """What a `kv_cache_dtype` comes to.

    A scale stands for all of a head where the numbers are floats, whose error is relative anyhow. int8 has one for
    each 32 neighbours (of heads of 64, 128, …; else one a head): a channel of outlying keys then
    costs its neighbours their precision, and not the whole head.

    Raises:
        InputError: no such dtype.
    """
    name = KV_CACHE_DTYPES.get(kv_cache_dtype)
    if name is None:
        raise InputError(unknown_kv_cache_dtype(kv_cache_dtype))
    if name == "auto":
        return KVFormat(name, head_dim, 0)
    fine = name == "int8" and head_dim >= 2 * _INT8_GROUP and head_dim & (head_dim - 1) == 0
    return KVFormat(name, head_dim, _INT8_GROUP if fine else head_dim)


def kv_bytes_per_token(text: TextConfig, itemsize: int, kv_cache_dtype: str = "auto") -> int:
    """Bytes that one token takes in the KV cache: keys, values and their scales, over all layers.

    `itemsize`: bytes of the model's dtype (2 for bfloat16).
    """
    one = kv_format(kv_cache_dtype, text.head_dim).bytes_per_head(itemsize)
    return 2 * text.num_hidden_layers * text.num_key_value_heads * one


def unknown_kv_cache_dtype(name: object) -> str:
    return f"kv_cache_dtype {name!r} is unknown: use auto, int8, fp8 (fp8_e4m3) or fp8_e5m2"
