"""How the language model's tokens see each other while training and while answering."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def branch_bias(branch: Tensor, owner: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask of rows of examples, each a common beginning (branch 0) and several continuations of it.

    A token sees its example's beginning and the earlier tokens of its own branch, so each branch is trained
    exactly as if it alone followed the beginning, which is computed once.

    Args:
        branch: [B, L], 0 for a beginning, 1, 2, … for its continuations.
        owner: [B, L], the example of each token; padding is an example of its own.

    Returns:
        [B, 1, L, L], 0 or very negative. Not -inf: tiles of nothing else make the gradients of fused kernels NaN.
    """
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    key = branch[:, None, :]
    seen = causal & ((key == 0) | (key == branch[:, :, None])) & (owner[:, None, :] == owner[:, :, None])
    bias = torch.zeros(seen.shape, dtype=dtype, device=branch.device)
    return bias.masked_fill_(~seen, -30000.0).unsqueeze(1)


class BranchedAttention:
    """The decoder's `attend` for a flat batch of B rows of L tokens."""

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias
        self.rows = bias.shape[0]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        q, k, v = (t.unflatten(0, (self.rows, -1)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return out.transpose(1, 2).flatten(0, 1)


class RowsAttention:
    """The decoder's `attend` for tokens in rows of several lengths, end to end: `rows` says (how many, how long)."""

    def __init__(
        self, branch: Tensor, owner: Tensor, rows: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> None:
        self.sizes = [count * length for count, length in rows]
        self.parts = [
            BranchedAttention(branch_bias(b.view(shape), o.view(shape), dtype))
            for shape, b, o in zip(rows, branch.split(self.sizes), owner.split(self.sizes), strict=True)
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cut = zip(self.parts, *(t.split(self.sizes) for t in (q, k, v)), strict=True)
        return torch.cat([part(layer, *own) for part, *own in cut])


class RotatingRowsAttention(RowsAttention):
    """The same with the rotation of queries and keys in one kernel; cos and sin as `RotaryTable.lookup` gives them."""

    def __init__(
        self,
        branch: Tensor,
        owner: Tensor,
        rows: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        rotation: tuple[Tensor, Tensor],
        heads: tuple[int, int],
    ) -> None:
        super().__init__(branch, owner, rows, dtype)
        self.rotation, self.heads = rotation, heads

    def rotate_and_attend(self, layer: int, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """`bias` is in `qkv` already: where gradients flow no product comes in parts."""
        from tiny_trainer.fused_steps import split_rotated

        q, k, v = split_rotated(qkv, *self.rotation, *self.heads)
        return self(layer, q, k, v).flatten(1)


class CachedAttention:
    """The decoder's `attend` while answering: B rows, right-padded prompts, then one token a row and step.

    Keys and values live at [B, kv_heads, capacity, head_dim]; row b's token at position p is at p.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.positions: Tensor | None = None

    def at(self, positions: Tensor) -> CachedAttention:
        """Set where this step's tokens stand: positions [B, T]."""
        self.positions = positions
        return self

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.positions is not None
        groups = q.shape[1] // k.shape[1]
        q, k, v = (t.unflatten(0, (self.rows, -1)).transpose(1, 2) for t in (q, k, v))
        if layer not in self.keys:
            shape = (self.rows, k.shape[1], self.capacity, k.shape[3])
            self.keys[layer], self.values[layer] = k.new_zeros(shape), v.new_zeros(shape)
        index = self.positions[:, None, :, None].expand_as(k)
        self.keys[layer].scatter_(2, index, k)
        self.values[layer].scatter_(2, index, v)
        end = q.shape[2] if q.shape[2] > 1 else self.capacity
        keys, values = (
            t[layer][:, :, :end].repeat_interleave(groups, dim=1) for t in (self.keys, self.values)
        )
        seen = torch.arange(end, device=q.device) <= self.positions[:, None, :, None]
        out = scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        return out.transpose(1, 2).flatten(0, 1)
