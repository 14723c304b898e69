"""Which published tensors make up each parameter of our model.

q, k, v and gate, up are stacked along their outputs; the patch embedding is a convolution in the published
files and a matrix here; everything else has the published name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_STACKED = (
    (re.compile(r"^(vpm\..*self_attn\.)qkv_proj\.(weight|bias)$"), ("q_proj", "k_proj", "v_proj")),
    (re.compile(r"^(llm\..*self_attn\.)qkv_proj\.(weight|bias)$"), ("q_proj", "k_proj", "v_proj")),
    (re.compile(r"^(llm\..*mlp\.)gate_up_proj\.(weight|bias)$"), ("gate_proj", "up_proj")),
)

_STACK_NAMES = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}

IGNORED = re.compile(r"(\.rotary_emb\.inv_freq$)|(^resampler\.pos_embed$)|(^vpm\.embeddings\.position_ids$)")
"""Tensors some checkpoints carry that are computed, not learned."""


@dataclass(frozen=True)
class Source:
    """A parameter's published parts, stacked along dimension 0 in this order."""

    target: str
    parts: tuple[str, ...]


def sources(parameter_names: Iterable[str]) -> list[Source]:
    """The published tensors for each of our parameters."""
    return [Source(name, _parts(name)) for name in parameter_names]


def _parts(name: str) -> tuple[str, ...]:
    for pattern, pieces in _STACKED:
        match = pattern.match(name)
        if match:
            prefix, suffix = match.groups()
            return tuple(f"{prefix}{piece}.{suffix}" for piece in pieces)
    return (name,)


def stacked_name(published: str) -> str:
    """The parameter of ours that a published tensor is part of."""
    for pattern, pieces in _STACKED:
        for piece in pieces:
            ours = published.replace(f".{piece}.", f".{_STACK_NAMES[pieces]}.")
            if ours != published and pattern.match(ours):
                return ours
    return published
