"""The resampler: a fixed number of learned queries look at one slice's patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from huoyan.layers.linear import Linear
from huoyan.layers.norm import LayerNorm
from huoyan.layers.packed_attention import packed_attention
from huoyan.models.config import ModelConfig
from huoyan.models.patches import Grid
from huoyan.models.siglip import PackedGrids

_NORM_EPS = 1e-6


def sincos_positions(count: int, width: int) -> Tensor:
    """[count, width]: `[sin(t * w), cos(t * w)]` with `w_k = 10000 ** (-k / (width / 2))`."""
    k = torch.arange(width // 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(count, dtype=torch.float64), 10000.0 ** (-k / (width / 2)))
    return torch.cat((angles.sin(), angles.cos()), dim=1).float()


class GridPositions:
    """2-D sine-cosine embeddings: the first half of the width encodes the column, the second the row."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._axis: dict[torch.device, Tensor] = {}

    def axis(self, count: int, device: torch.device) -> Tensor:
        found = self._axis.get(device)
        if found is None or found.shape[0] < count:
            found = sincos_positions(max(count, 70), self.width // 2).to(device)
            self._axis[device] = found
        return found

    def __call__(self, grids: Sequence[Grid], device: torch.device, dtype: torch.dtype) -> Tensor:
        """[sum(rows * columns), width]."""
        axis = self.axis(max(max(grid) for grid in grids), device).to(dtype)
        parts: dict[Grid, Tensor] = {}
        for rows, columns in grids:
            if (rows, columns) not in parts:
                of_column = axis[:columns].expand(rows, -1, -1)
                of_row = axis[:rows].unsqueeze(1).expand(-1, columns, -1)
                parts[rows, columns] = torch.cat((of_column, of_row), dim=-1).flatten(0, 1)
        return torch.cat([parts[grid] for grid in grids])


class CrossAttention(nn.Module):
    """Multi-head attention with stacked input projections (the layout of `torch.nn.MultiheadAttention`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, (width,), bias=True)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]
    ) -> Tensor:
        """q [queries, width], the same for every slice; k, v [sum(k_lengths), width].

        Returns [slices * queries, width].
        """
        linear = nn.functional.linear
        (w_q, w_k, w_v), (b_q, b_k, b_v) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        slices = len(k_lengths)
        heads = (self.heads, -1)
        out = packed_attention(
            linear(q, w_q, b_q).unflatten(-1, heads).repeat(slices, 1, 1),
            linear(k, w_k, b_k).unflatten(-1, heads),
            linear(v, w_v, b_v).unflatten(-1, heads),
            q_lengths,
            k_lengths,
        )
        projected: Tensor = self.out_proj(out.flatten(1))
        return projected


class Resampler(nn.Module):
    """x [P, vision_hidden] of slices with the given grids -> [slices, query_num, hidden]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.text.hidden_size
        self.query = nn.Parameter(torch.empty(config.query_num, width))
        # The published code has no projection between equal widths.
        self.kv_proj = (
            nn.Identity()
            if config.vision.hidden_size == width
            else Linear(config.vision.hidden_size, (width,), bias=False)
        )
        self.attn = CrossAttention(width, config.resampler_heads)
        self.ln_q = LayerNorm(width, _NORM_EPS)
        self.ln_kv = LayerNorm(width, _NORM_EPS)
        self.ln_post = LayerNorm(width, _NORM_EPS)
        self.proj = nn.Parameter(torch.empty(width, width))
        self.positions = GridPositions(width)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        grids = PackedGrids.of(grids)
        values = self.ln_kv(self.kv_proj(x))
        keys = values + self.positions(grids, x.device, values.dtype)
        query = self.ln_q(self.query)
        out = self.attn(query, keys, values, grids.query_lengths(query.shape[0]), grids.lengths)
        projected: Tensor = self.ln_post(out) @ self.proj
        return projected.view(len(grids), -1, projected.shape[-1])
