"""Bytes of a checkpoint's weights as they lie on the device, by part of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from huoyan.models.layout import IGNORED
from huoyan.planning.pieces import KEPT_POSITIONS

if TYPE_CHECKING:
    from huoyan.models.config import ModelConfig
    from huoyan.planning.shapes import Shape

INT4_GROUP = 128
"""Inputs that share a scale, where int4 is only predicted."""
_LAYER_MATRIX = re.compile(r"^llm\.model\.layers\.\d+\..*_proj$")
_PACKED = (".qweight", ".weight_packed")
_BESIDE_PACKED = (
    ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx",
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Bytes on the device."""

    layers: int
    """The decoder's layers and last norm."""
    embeddings: int
    head: int
    """0 where it is the embeddings' own."""
    vision: int
    resampler: int
    tables: int
    """Rotations of every position, and the resampler's positions; float32 whatever the model is."""
    int4: bool
    """Whether the decoder's matrices are int4."""

    @property
    def total(self) -> int:
        return self.layers + self.embeddings + self.head + self.vision + self.resampler + self.tables

    @property
    def read_by_decode(self) -> int:
        """What a decode step reads: everything that makes a token of a token, but one row of the embeddings."""
        return self.layers + (self.head or self.embeddings)


@dataclass(frozen=True)
class _Matrix:
    """One published matrix or vector: how many values; in int4 how many share a scale, in int8 how many rows."""

    values: int
    group: int = 0
    int8_rows: int = 0

    def nbytes(self, itemsize: int) -> int:
        """As loaded: int4 at half a byte a value, a scale and a zero point a group in the model's dtype; int8 at
        one, and a float32 scale a row."""
        if self.int8_rows:
            return self.values + 4 * self.int8_rows
        if not self.group:
            return self.values * itemsize
        return self.values // 2 + 2 * (self.values // self.group) * itemsize


def weights(
    config: ModelConfig, shapes: Mapping[str, Shape], itemsize: int, *, int4: bool | None = None
) -> Weights:
    """What the tensors of a checkpoint come to.

    Args:
        shapes: each published tensor's.
        itemsize: bytes of a value of the dtype the model runs in.
        int4: None takes the decoder's matrices as they are; True predicts them in int4 (groups of 128),
            False in `itemsize`.
    """
    last = f"vpm.encoder.layers.{config.vision.num_hidden_layers - 1}."
    parts = dict.fromkeys(("layers", "embeddings", "head", "vision", "resampler"), 0)
    quantized = False
    for name, matrix in _matrices(shapes).items():
        if IGNORED.search(name) or (config.vision.drop_last_layer and name.startswith(last)):
            continue
        if int4 is not None and _LAYER_MATRIX.match(name.removesuffix(".weight")):
            group = (matrix.group or INT4_GROUP) if int4 and matrix.values % INT4_GROUP == 0 else 0
            matrix = _Matrix(matrix.values, group)
        quantized |= matrix.group > 0
        part = _part(name)
        if part == "head" and config.text.tie_word_embeddings:
            continue
        parts[part] += matrix.nbytes(itemsize)
    return Weights(**parts, tables=table_bytes(config, itemsize), int4=quantized)


def _matrices(shapes: Mapping[str, Shape]) -> dict[str, _Matrix]:
    out: dict[str, _Matrix] = {}
    for name, shape in shapes.items():
        if name.endswith(_PACKED):
            matrix = name.rpartition(".")[0]
            scales = shapes.get(f"{matrix}.scales") or shapes.get(f"{matrix}.weight_scale") or (1,)
            values = 8 * prod(shape)
            out[matrix] = _Matrix(values, max(values // max(prod(scales), 1), 1))
        elif not name.endswith(_BESIDE_PACKED):
            out[name] = _Matrix(prod(shape), int8_rows=shape[0] if f"{name}_scale" in shapes else 0)
    return out


def _part(name: str) -> str:
    if name.startswith("vpm."):
        return "vision"
    if name.startswith("resampler."):
        return "resampler"
    if name.startswith("llm.model.embed_tokens"):
        return "embeddings"
    return "head" if name.startswith("llm.lm_head") else "layers"


def table_bytes(config: ModelConfig, itemsize: int) -> int:
    """Of what is computed once: rotations, positions of patches."""
    text = config.text
    rotations = text.max_position_embeddings * text.head_dim * 4
    # Of `GridPositions`.
    positions = KEPT_POSITIONS * (text.hidden_size // 2) * itemsize
    return rotations + positions
