"""What every attention on CUDA begins with: one kernel that rotates queries and keys and writes keys and values to the
cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from huoyan.kernels.rope_cache import rope_cache

if TYPE_CHECKING:
    from huoyan.engine.kv_cache import KVCache
    from huoyan.models.minicpmv import MiniCPMV


class RotatedAttention:
    """Of a `huoyan.models.qwen2.FusedAttend` all but what follows the rotation."""

    def __init__(self, model: MiniCPMV, cache: KVCache) -> None:
        self._cache = cache
        self._heads = model.config.text.num_attention_heads
        self._dtype = model.dtype
        self._table = model.llm.model.rotary.table(cache.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("on CUDA rotation and attention are one: rotate_and_attend")

    def _rotate(
        self, layer: int, qkv: Tensor, bias: Tensor | None, positions: Tensor, slots: Tensor
    ) -> Tensor:
        """Rows [T, heads + 2 kv_heads, head_dim], rotated and in the cache. `qkv` as `FusedAttend` has it, changed;
        `positions` and `slots` int32 [T], a slot of -1 is nowhere."""
        keys, values = self._cache.layer(layer)
        rotated = rope_cache(
            qkv, positions, self._table, slots, keys.typed, values.typed, keys.scales, values.scales,
            bias=bias, dtype=self._dtype,
        )  # fmt: skip
        rows: Tensor = rotated.unflatten(1, (-1, keys.numbers.shape[3]))
        return rows
