"""What a model's work costs at least: bytes that must be read, and operations, from its sizes alone.

Pure functions of the config; nothing here imports torch. Counted are the matrix products and attention (a
multiplication and an addition are two operations), each weight read once a pass and each key and value once. What
stays in caches between layers, norms and activations are not, so that the time they give is a limit and no estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from huoyan.models.config import ModelConfig, TextConfig

MODULES = ("qkv", "o", "gate_up", "down")
"""The matrices of a decoder layer, as `huoyan quantize --modules` names them."""


@dataclass(frozen=True)
class Cost:
    """Bytes moved and operations of one pass."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.bytes * times, self.flops * times)

    def seconds(self, speed: Speed) -> float:
        """The least time of a pass: whichever of memory and arithmetic takes longer, the other hidden behind it."""
        return max(self.bytes / speed.bytes_per_s, self.flops / speed.flops_per_s)


@dataclass(frozen=True)
class Speed:
    """Of a device: what a copy reads and writes, or a matrix-vector product reads, and what a product of large
    matrices computes, a second."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class WeightFormat:
    """How the weights lie in memory."""

    itemsize: int = 2
    """Bytes of a value that is not in int4; of scales and zero points too."""
    group_size: int | None = None
    """Inputs that share a scale and a zero point in int4; None where nothing is in int4."""
    int4_modules: frozenset[str] = frozenset(MODULES)
    """Which of `MODULES` are in int4, where any are."""
    int8_head: bool = False
    """Whether the head has a byte a value, and a float32 scale a row."""

    def matrix_bytes(self, values: int, module: str = "") -> float:
        """Bytes of a matrix of `values` values; `module` is its name where it is a decoder layer's."""
        if self.group_size is None or module not in self.int4_modules:
            return values * self.itemsize
        return values / 2 + 2 * self.itemsize * (values / self.group_size)


def layer_matrices(text: TextConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each of a decoder layer's `MODULES`."""
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    return {
        "qkv": (q + 2 * kv, text.hidden_size),
        "o": (text.hidden_size, q),
        "gate_up": (2 * text.intermediate_size, text.hidden_size),
        "down": (text.hidden_size, text.intermediate_size),
    }


def layer_values(text: TextConfig) -> int:
    """Values of a decoder layer's matrices."""
    return sum(rows * columns for rows, columns in layer_matrices(text).values())


def kv_token_bytes(text: TextConfig, itemsize: float = 2) -> float:
    """Bytes of one token's keys and values in all layers. `itemsize` may count scales that come with a value."""
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize


def decoder_bytes(text: TextConfig, weights: WeightFormat) -> float:
    """Bytes of the decoder's layers and last norm: what every pass reads."""
    matrices = layer_matrices(text)
    layer = sum(weights.matrix_bytes(rows * columns, name) for name, (rows, columns) in matrices.items())
    vectors = matrices["qkv"][0] + 2 * text.hidden_size
    return text.num_hidden_layers * (layer + vectors * weights.itemsize) + text.hidden_size * weights.itemsize


def head_bytes(text: TextConfig, weights: WeightFormat) -> float:
    """Bytes of the matrix that gives logits (the embedding's own where they are tied)."""
    values = text.vocab_size * text.hidden_size
    return values + 4 * text.vocab_size if weights.int8_head else weights.matrix_bytes(values)


def encoder_bytes(config: ModelConfig, weights: WeightFormat) -> float:
    """Bytes of the picture encoder and the resampler."""
    vision, width = config.vision, config.vision.hidden_size
    pixels = vision.num_channels * vision.patch_size**2
    layer = 4 * (width + 1) * width + (width + 1) * vision.intermediate_size
    layer += (vision.intermediate_size + 1) * width + 4 * width
    values = (pixels + 1) * width + vision.patches_per_side**2 * width
    values += vision.num_encoder_layers * layer + 2 * width
    out = config.text.hidden_size
    values += config.query_num * out + (0 if out == width else width * out)
    values += 4 * (out + 1) * out + out * out + 6 * out
    return values * weights.itemsize


def encode(config: ModelConfig, patches: Sequence[int], weights: WeightFormat) -> Cost:
    """Encoding slices of so many patches each, together."""
    vision, width, wide = config.vision, config.vision.hidden_size, config.vision.intermediate_size
    total, squares = sum(patches), sum(count * count for count in patches)
    pixels = vision.num_channels * vision.patch_size**2
    flops = 2 * total * pixels * width
    flops += vision.num_encoder_layers * (2 * total * (4 * width + 2 * wide) * width + 4 * squares * width)
    out, queries = config.text.hidden_size, config.query_num
    flops += 0 if out == width else 2 * total * width * out
    # The queries are the same for all slices.
    flops += 2 * (queries + 2 * total) * out * out + 4 * queries * total * out
    flops += 2 * 2 * len(patches) * queries * out * out
    read = encoder_bytes(config, weights) if patches else 0
    made = len(patches) * queries * out * weights.itemsize
    return Cost(read + total * pixels + made, flops)


def prefill(
    config: ModelConfig, tokens: int, weights: WeightFormat, *, cached: int = 0, kv_token: float | None = None
) -> Cost:
    """One sequence's prompt in one pass, to the logits of its last token.

    Args:
        cached: tokens before these whose keys and values are there already.
        kv_token: bytes of a token's keys and values; None: of the weights' itemsize.
    """
    text = config.text
    kv = kv_token_bytes(text, weights.itemsize) if kv_token is None else kv_token
    seen = tokens * cached + tokens * (tokens + 1) // 2
    flops = 2 * tokens * layer_values(text) * text.num_hidden_layers + _attention(text, seen) + _head(text, 1)
    read = (
        decoder_bytes(text, weights)
        + head_bytes(text, weights)
        + tokens * text.hidden_size * weights.itemsize
    )
    return Cost(read + (cached + tokens) * kv, flops)


def decode_step(
    config: ModelConfig,
    contexts: Sequence[int],
    weights: WeightFormat,
    *,
    kv_token: float | None = None,
    shared: int = 0,
) -> Cost:
    """One token for each of several sequences.

    Args:
        contexts: tokens that each sequence's new one sees, itself included.
        kv_token: bytes of a token's keys and values; None: of the weights' itemsize.
        shared: first tokens that all have in common (beams, samples of one prompt), read once.
    """
    text = config.text
    kv = kv_token_bytes(text, weights.itemsize) if kv_token is None else kv_token
    rows, seen = len(contexts), sum(contexts)
    flops = (
        2 * rows * layer_values(text) * text.num_hidden_layers + _attention(text, seen) + _head(text, rows)
    )
    read = (
        decoder_bytes(text, weights) + head_bytes(text, weights) + rows * text.hidden_size * weights.itemsize
    )
    return Cost(read + (seen - shared * max(rows - 1, 0)) * kv, flops)


def _attention(text: TextConfig, seen: int) -> int:
    """Operations of queries that see `seen` keys together, in all layers."""
    return 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * seen


def _head(text: TextConfig, rows: int) -> int:
    return 2 * rows * text.vocab_size * text.hidden_size
