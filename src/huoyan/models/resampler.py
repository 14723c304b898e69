"""The resampler: a fixed number of learned queries look at one slice's patches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from huoyan.layers.linear import Linear
from huoyan.layers.norm import LayerNorm
from huoyan.layers.packed_attention import packed_attention
from huoyan.models.config import ModelConfig
from huoyan.models.patches import Grid
from huoyan.models.siglip import PackedGrids
from huoyan.planning.pieces import KEPT_POSITIONS, PROJECTED_PATCHES, RESAMPLED_PATCHES, runs_within

_NORM_EPS = 1e-6


def sincos_positions(count: int, width: int, first: int = 0) -> Tensor:
    """[count, width]: `[sin(t * w), cos(t * w)]` for t from `first` on, with `w_k = 10000 ** (-k / (width / 2))`."""
    k = torch.arange(width // 2, dtype=torch.float64)
    angles = torch.outer(
        torch.arange(first, first + count, dtype=torch.float64), 10000.0 ** (-k / (width / 2))
    )
    return torch.cat((angles.sin(), angles.cos()), dim=1).float()


class GridPositions:
    """2-D sine-cosine embeddings: the first half of the width encodes the column, the second the row."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, grids: Sequence[Grid], device: torch.device, dtype: torch.dtype) -> Tensor:
        """[sum(rows * columns), width]."""
        out = torch.empty(sum(r * c for r, c in grids), self.width, dtype=dtype, device=device)
        half = self.width // 2
        at = 0
        for (rows, columns), alike in groupby(grids):
            count = sum(1 for _ in alike)
            slices = out[at : at + count * rows * columns].view(count, rows, columns, self.width)
            for first in range(0, columns, KEPT_POSITIONS):
                axis = self._axis(first, min(KEPT_POSITIONS, columns - first), device, dtype)
                slices[:, :, first : first + len(axis), :half] = axis
            for first in range(0, rows, KEPT_POSITIONS):
                axis = self._axis(first, min(KEPT_POSITIONS, rows - first), device, dtype)
                slices[:, first : first + len(axis), :, half:] = axis.unsqueeze(1)
            at += count * rows * columns
        return out

    def _axis(self, first: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[count, width / 2] of positions from `first` on. Only the first ones, which every picture has, are kept: the
        others are those of strips, which may be thousands long."""
        if first:
            return sincos_positions(count, self.width // 2, first).to(device, dtype)
        if (device, dtype) not in self._kept:
            self._kept[device, dtype] = sincos_positions(KEPT_POSITIONS, self.width // 2).to(device, dtype)
        return self._kept[device, dtype][:count]


class CrossAttention(nn.Module):
    """Multi-head attention with stacked input projections (the layout of `torch.nn.MultiheadAttention`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, (width,), bias=True)

    def project(self, which: int, x: Tensor, *, over: bool = False, bare: bool = False) -> Tensor:
        """Queries (0), keys (1) or values (2) of x [rows, width]: [rows, heads, head_dim].

        `over`: many rows are written over x, some at a time, where nothing is to be differentiated. `bare`: without
        their bias, as `forward` wants keys and values.
        """
        weight = self.in_proj_weight.chunk(3)[which]
        bias = None if bare else self.in_proj_bias.chunk(3)[which]
        pieces = -(-len(x) // PROJECTED_PATCHES)
        if over and pieces > 1 and not torch.is_grad_enabled():
            for rows in x.chunk(pieces):
                rows.copy_(nn.functional.linear(rows, weight, bias))
        else:
            x = nn.functional.linear(x, weight, bias)
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]
    ) -> Tensor:
        """Of projected q [queries, heads, head_dim], the same for every slice, and k, v [sum(k_lengths), …] without
        their biases: a key's would move all scores of a query alike, and weights sum up to one, so that a value's comes
        out whole.

        Returns [slices * queries, width].
        """
        slices = len(k_lengths)
        out = packed_attention(q.repeat(slices, 1, 1), k, v, q_lengths, k_lengths)
        projected: Tensor = self.out_proj(out.flatten(1) + self.in_proj_bias.chunk(3)[2])
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
        runs = [(0, len(grids))] if torch.is_grad_enabled() else runs_within(grids.lengths, RESAMPLED_PATCHES)
        if len(runs) == 1:
            return self._some(x, grids)
        parts = x.split([sum(grids.lengths[first:last]) for first, last in runs])
        some = [self._some(part, PackedGrids(grids[a:b])) for part, (a, b) in zip(parts, runs, strict=True)]
        return torch.cat(some)

    def _some(self, x: Tensor, grids: PackedGrids) -> Tensor:
        values = self.ln_kv(self.kv_proj(x))
        # Each [P, width] is given up as soon as it is projected: of one long slice nothing takes more memory.
        keys = self.attn.project(
            1, self.positions(grids, x.device, values.dtype).add_(values), over=True, bare=True
        )
        values = self.attn.project(2, values, over=True, bare=True)
        query = self.attn.project(0, self.ln_q(self.query))
        out = self.attn(query, keys, values, grids.query_lengths(len(query)), grids.lengths)
        projected: Tensor = self.ln_post(out) @ self.proj
        return projected.view(len(grids), -1, projected.shape[-1])
