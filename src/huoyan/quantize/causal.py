"""Plain causal attention over packed sequences, without a cache: for calibration and measuring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class CausalAttention:
    """See `huoyan.models.qwen2.Attend`: each sequence of `lengths` attends to its own past only."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        pieces = (t.transpose(0, 1)[None].split(self.lengths, dim=2) for t in (q, k, v))
        for one_q, one_k, one_v in zip(*pieces, strict=True):
            out = scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)
