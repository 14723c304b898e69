"""The language model: Qwen2, over a flat batch of tokens of any number of sequences."""

from __future__ import annotations

from itertools import islice
from typing import Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from huoyan.layers.blocks import over_rows
from huoyan.layers.embedding import embedding
from huoyan.layers.fused import add_norm
from huoyan.layers.linear import Linear
from huoyan.layers.norm import RMSNorm
from huoyan.layers.rope import RotaryTable, apply_rope
from huoyan.models.config import TextConfig
from huoyan.planning.pieces import mlp_rows


class Attend(Protocol):
    """Attention of one layer over whatever the tokens may see; owns the KV cache.

    q [T, heads, head_dim]; k, v [T, kv_heads, head_dim], q and k already rotated -> [T, heads, head_dim].
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class FusedAttend(Attend, Protocol):
    """Attention that also rotates: qkv [T, (heads + 2 kv_heads) * head_dim] -> [T, heads * head_dim].

    qkv may be float32 parts, [S, T, …], to be summed with `bias`, which has no other meaning.
    """

    def rotate_and_attend(self, layer: int, qkv: Tensor, bias: Tensor | None) -> Tensor: ...


def rotates(attend: Attend) -> TypeGuard[FusedAttend]:
    """Whether attention rotates queries and keys itself."""
    return hasattr(attend, "rotate_and_attend")


Turns: TypeAlias = "tuple[Tensor, Tensor] | None"
"""Cosines and sines of each token's position, see `RotaryTable.lookup`; None where attention rotates."""


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, (q, kv, kv), bias=True)
        self.o_proj = Linear(q, (config.hidden_size,), bias=False)

    def forward(self, layer: int, x: Tensor, turns: Turns, attend: Attend, over: bool = False) -> Tensor:
        """`over`: x [T, hidden] may be written over."""
        if turns is None:
            assert rotates(attend)
            fused = attend.rotate_and_attend(layer, self.qkv_proj.parts(x), self.qkv_proj.bias)
            return self.o_proj.parts(fused, x if over else None)
        qkv: Tensor = self.qkv_proj(x)
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        rotated = apply_rope(heads[:, : self.heads + self.kv_heads], *turns)
        q, k = rotated.split((self.heads, self.kv_heads), dim=1)
        v = heads[:, self.heads + self.kv_heads :]
        out: Tensor = self.o_proj(attend(layer, q, k, v).flatten(1))
        return out


class MLP(nn.Module):
    """silu(gate) * up, gate and up stacked in one product."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, (width, width), bias=False)
        self.down_proj = Linear(width, (config.hidden_size,), bias=False)

    def forward(self, x: Tensor, over: bool = False) -> Tensor:
        """x [T, hidden] -> the same; `over`: x may be written over, and parts may be given, see `Linear.parts`."""
        if over and x.is_cuda and isinstance(self.gate_up_proj, Linear) and not torch.is_grad_enabled():
            # Of a long prompt this is a step's widest tensor. An int4 matrix, which would be made dense for each piece,
            # has a way of its own.
            some = mlp_rows(len(x))
            if some < len(x):
                return over_rows(self._parts, x, some)
        if over:
            return self._parts(x)
        whole: Tensor = self.down_proj(self.gate_up_proj.gated(x))
        return whole

    def _parts(self, x: Tensor) -> Tensor:
        return self.down_proj.parts(self.gate_up_proj.gated(x), x)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, layer: int, x: Tensor, residual: Tensor | None, turns: Turns, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Returns (the layer's last addition, the stream it is to be added to): the next norm adds them."""
        # The first layer's are its caller's.
        own = layer > 0
        x, residual = add_norm(self.input_layernorm, x, residual, own)
        x = self.self_attn(layer, x, turns, attend, over=True)
        x, residual = add_norm(self.post_attention_layernorm, x, residual, own)
        return self.mlp(x, over=True), residual


DIFFERENT_LAYERS = 2
"""Layers that launch what all of them do: the first has no residual stream of its own."""


class Decoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config.head_dim, config.rope_theta, config.max_position_embeddings)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        out: Tensor | None = None,
        layers: int | None = None,
    ) -> Tensor:
        """`out`: [T, hidden] where the result goes, which may be x itself; `layers`: only so many, of no use but to see
        what they take."""
        turns = None if rotates(attend) else self.rotary.lookup(positions)
        residual: Tensor | None = None
        for i, layer in enumerate(islice(self.layers, layers)):
            # The first one's residual is x; from its second norm on the stream is a tensor of its own.
            x, residual = layer(i, x, residual, turns, attend)
        return add_norm(self.norm, x, residual, out=out)[0]


class Qwen2(nn.Module):
    """`model` and `lm_head`; the head shares the embedding's weight where the checkpoint ties them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, (config.vocab_size,), bias=False)
