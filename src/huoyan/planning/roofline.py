"""Tokens a second that a card's memory and arithmetic allow at most: limits, not measurements.

A decode step reads the decoder's weights once and every sequence's keys and values, and computes two operations a
weight and token; whichever takes longer is the step's least time (Williams et al., "Roofline", 2009). Launches,
sampling and imperfect kernels come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.models.costs import WeightFormat, decode_step, layer_values

if TYPE_CHECKING:
    from huoyan.models.config import ModelConfig
    from huoyan.planning.cards import Card
    from huoyan.planning.memory import Memory

BATCHES = (1, 8, 64)


@dataclass(frozen=True)
class Limit:
    """What a card cannot go beyond."""

    card: str
    fits: bool
    """Whether the weights and one sequence fit its memory."""
    decode: dict[int, float | None]
    """Tokens a second in all, by batch; None where so many sequences do not fit."""
    prefill: float
    """Tokens of prompt a second."""


def limit(config: ModelConfig, parts: Memory, card: Card, length: int, fit: int) -> Limit:
    """Of sequences of `length` tokens (keys and values of all of them are read), of which `fit` have room."""
    decode = {
        batch: batch / step_seconds(config, parts, card, batch, length) if batch <= fit else None
        for batch in BATCHES
    }
    return Limit(
        card.name,
        fit > 0,
        decode,
        card.flops / (2 * config.text.num_hidden_layers * layer_values(config.text)),
    )


def step_seconds(config: ModelConfig, parts: Memory, card: Card, batch: int, length: int) -> float:
    """The least time of a decode step."""
    read = parts.weights.read_by_decode + batch * length * parts.kv_token
    operations = decode_step(config, [length] * batch, WeightFormat()).flops
    return max(read / card.bandwidth, operations / card.flops)
