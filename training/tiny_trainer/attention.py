"""How the language model's tokens see each other while training and while answering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def branch_bias(branch: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask of rows that hold a common beginning (branch 0) and several continuations of it.

    A token sees the beginning and the earlier tokens of its own branch, so each branch is trained exactly
    as if it alone followed the beginning, which is computed once.

    Args:
        branch: [B, L], 0 for the beginning, 1, 2, … for the continuations, anything else for padding.

    Returns:
        [B, 1, L, L], 0 or very negative. Not -inf: tiles of nothing else make the gradients of fused kernels NaN.
    """
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    key = branch[:, None, :]
    seen = causal & ((key == 0) | (key == branch[:, :, None]))
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
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return out.transpose(1, 2).flatten(0, 1)


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


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]
) -> Tensor:
    """What `huoyan.layers.packed_attention.packed_attention` computes, by padding to the longest sequence."""
    q_rows, q_length = _padded_rows(q_lengths, q.device)
    k_rows, k_length = _padded_rows(k_lengths, k.device)
    count = len(k_lengths)

    def pad(x: Tensor, rows: Tensor, length: int) -> Tensor:
        whole = x.new_zeros(count * length, *x.shape[1:]).index_copy(0, rows, x)
        return whole.unflatten(0, (count, length)).transpose(1, 2)

    there = torch.zeros(count * k_length, dtype=torch.bool, device=k.device)
    there[k_rows] = True
    mask = there.view(count, 1, 1, k_length).expand(-1, -1, q_length, -1)
    out = scaled_dot_product_attention(
        pad(q, q_rows, q_length), pad(k, k_rows, k_length), pad(v, k_rows, k_length), attn_mask=mask
    )
    return out.transpose(1, 2).flatten(0, 1)[q_rows]


def _padded_rows(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
    """Where each token of packed sequences goes among padded ones, and the padded length."""
    length = -(-max(lengths) // 8) * 8
    sizes = np.array(lengths)
    starts = np.repeat(np.arange(len(sizes)) * length - (sizes.cumsum() - sizes), sizes)
    rows = torch.from_numpy(starts + np.arange(sizes.sum()))
    return rows.to(device, non_blocking=True), length
