"""The picture encoder: SigLIP as a NaViT, over slices of any grid packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from huoyan.layers.embedding import embedding
from huoyan.layers.fused import add_norm
from huoyan.layers.linear import Linear, gelu_of
from huoyan.layers.norm import LayerNorm
from huoyan.layers.packed_attention import Lengths, packed_attention, to_device
from huoyan.models.config import VisionConfig
from huoyan.models.patches import Grid


@lru_cache(maxsize=4096)
def position_buckets(count: int, side: int) -> Tensor:
    """Which of `side` equal cells of [0, 1) each of `count` evenly spaced rows (or columns) falls into.

    Row i of n stands at i/n, divided in float32. Stepping by a rounded 1/n instead would put rows that fall on
    a border (15 of 25 on the 42nd of 70) into the cell before it.
    """
    fractions = torch.arange(count, dtype=torch.float32) / torch.full((count,), float(count))
    borders = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(fractions, borders, right=True)


class PackedGrids(tuple[Grid, ...]):
    """Grids of slices packed end to end, with what the encoder and the resampler derive from them. What lies on a
    device is sent there once, and lives as long as this does."""

    @classmethod
    def of(cls, grids: Sequence[Grid]) -> PackedGrids:
        return grids if isinstance(grids, cls) else cls(grids)

    @cached_property
    def lengths(self) -> Lengths:
        """Patches of each slice."""
        return Lengths(rows * columns for rows, columns in self)

    def query_lengths(self, queries: int) -> Lengths:
        """The same number of queries for each slice."""
        known: dict[int, Lengths] = self.__dict__.setdefault("_query_lengths", {})
        return known.setdefault(queries, Lengths([queries] * len(self)))

    def positions(self, side: int, device: torch.device) -> Tensor:
        """`position_ids` on a device."""
        known: dict[tuple[int, torch.device], Tensor] = self.__dict__.setdefault("_positions", {})
        if (side, device) not in known:
            known[side, device] = to_device(position_ids(self, side), device)
        return known[side, device]


def position_ids(grids: Sequence[Grid], side: int) -> Tensor:
    """Rows of the position table for every patch of packed grids: [sum(rows * columns)]."""
    return torch.cat([_grid_position_ids(grid, side) for grid in grids])


@lru_cache(maxsize=512)
def _grid_position_ids(grid: Grid, side: int) -> Tensor:
    rows, columns = grid
    return (position_buckets(rows, side)[:, None] * side + position_buckets(columns, side)).flatten()


class Embeddings(nn.Module):
    """A linear map of a patch's pixels, plus a learned position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        pixels = config.num_channels * config.patch_size**2
        self.side = config.patches_per_side
        self.patch_embedding = Linear(pixels, (config.hidden_size,), bias=True)
        self.position_embedding = embedding(self.side**2, config.hidden_size)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        positions = PackedGrids.of(grids).positions(self.side, patches.device)
        out: Tensor = self.patch_embedding(patches) + self.position_embedding(positions)
        return out


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv_proj = Linear(width, (width, width, width), bias=True)
        self.out_proj = Linear(width, (width,), bias=True)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Returns (what is to be added to the stream, a bias [hidden] that it still lacks). May be written over x."""
        qkv, bias = self.qkv_proj.without_bias(x)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)
        # Written over what it is made of, as is all that follows: this is where the encoder takes the most memory.
        answers = packed_attention(q, k, v, lengths, lengths, bias, over=not torch.is_grad_enabled())
        return self.out_proj.without_bias(answers.flatten(1), x)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, (config.intermediate_size,), bias=True)
        self.fc2 = Linear(config.intermediate_size, (config.hidden_size,), bias=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Attention.forward`."""
        return self.fc2.without_bias(gelu_of(self.fc1, x), x)


class EncoderLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns (the layer's last addition, a bias that it lacks, the stream it is to be added to): the next norm
        adds them."""
        x, residual = add_norm(self.layer_norm1, x, residual, added=bias)
        x, bias = self.self_attn(x, lengths)
        x, residual = add_norm(self.layer_norm2, x, residual, added=bias)
        x, bias = self.mlp(x)
        return x, bias, residual


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))


class SiglipEncoder(nn.Module):
    """patches [P, pixels] of slices with the given grids -> [P, hidden]; slices never see each other."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        grids = PackedGrids.of(grids)
        return self.layers(self.embeddings(patches, grids), grids.lengths)

    def layers(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """What follows the embeddings [P, hidden] of slices of these lengths; x may be written over."""
        bias: Tensor | None = None
        residual: Tensor | None = None
        for layer in self.encoder.layers:
            x, bias, residual = layer(x, bias, residual, lengths)
        return add_norm(self.post_layernorm, x, residual, added=bias)[0]
