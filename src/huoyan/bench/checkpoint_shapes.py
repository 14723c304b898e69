"""Sizes of checkpoints that nobody has to have: what their configs would say. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huoyan.errors import InputError
from huoyan.media.types import SliceRules
from huoyan.models.config import ModelConfig, awq_config, parse_model_config

PATCH = 14


@dataclass(frozen=True)
class CheckpointShape:
    """Sizes of a MiniCPM-V 2.6; the defaults are the published 8 B model's."""

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    vocab_size: int = 151666
    max_position_embeddings: int = 32768
    vision_hidden_size: int = 1152
    vision_intermediate_size: int = 4304
    vision_num_hidden_layers: int = 27
    vision_num_attention_heads: int = 16
    vision_image_size: int = 980
    """Pixels a side that the table of learned positions covers."""
    query_num: int = 64
    """Embeddings a slice."""
    scale_resolution: int = 448
    """Pixels a side of the square that a slice has the area of."""
    max_slice_nums: int = 9
    group_size: int = 128
    """Inputs that share a scale, in int4."""


SHAPES = {
    "full": CheckpointShape(),
    "small": CheckpointShape(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
        max_position_embeddings=8192,
        vision_hidden_size=144,
        vision_intermediate_size=320,
        vision_num_hidden_layers=3,
        vision_num_attention_heads=2,
    ),
}


NAMED_SHAPES = {"minicpm-v-2_6": "full", "small": "small"}
"""Names of sizes, to be had without a checkpoint; with `-int4` behind them as AutoAWQ would quantize them."""


def named_shape(model: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """(shape, quantization) of a name of sizes; None for what is a folder, or no such name."""
    name = os.fspath(model)
    shape, quantization = name.removesuffix("-int4"), "awq" if name.endswith("-int4") else None
    return None if shape not in NAMED_SHAPES or Path(name).is_dir() else (NAMED_SHAPES[shape], quantization)


def sizes_of(shape: str, quantization: str | None) -> tuple[ModelConfig, SliceRules]:
    """What a checkpoint of this shape would say of its sizes and of how it cuts pictures, without writing one."""
    sizes = shape_of(shape)
    check_shape(sizes, quantization)
    config = parse_model_config(config_of(sizes, usual_dtype(quantization), quantization))
    return config, SliceRules(sizes.scale_resolution, PATCH, sizes.max_slice_nums)


def usual_dtype(quantization: str | None) -> str:
    """That of the published checkpoints."""
    return "float16" if quantization else "bfloat16"


def shape_of(shape: str | CheckpointShape) -> CheckpointShape:
    """The sizes of a name. Raises InputError."""
    if isinstance(shape, CheckpointShape):
        return shape
    if shape not in SHAPES:
        raise InputError(f"shape {shape!r} is unknown: use {' or '.join(SHAPES)}, or a CheckpointShape")
    return SHAPES[shape]


def check_shape(sizes: CheckpointShape, quantization: str | None) -> None:
    """What a checkpoint's config cannot say wrong but a shape made up by hand can."""
    if sizes.hidden_size % 128:
        raise InputError(f"hidden_size must be a multiple of 128, a resampler head (got {sizes.hidden_size})")
    if sizes.vision_hidden_size % sizes.vision_num_attention_heads:
        raise InputError("vision_num_attention_heads must divide vision_hidden_size")
    inputs = {"hidden_size": sizes.hidden_size, "intermediate_size": sizes.intermediate_size}
    for name, width in inputs.items():
        if quantization and width % sizes.group_size:
            raise InputError(f"{name} must be a multiple of group_size {sizes.group_size} (got {width})")


def config_of(sizes: CheckpointShape, dtype: str, quantization: str | None) -> dict[str, Any]:
    """`config.json` but for the ids of special tokens."""
    named = asdict(sizes)
    vision = {key.removeprefix("vision_"): named.pop(key) for key in list(named) if key.startswith("vision_")}
    slices, group_size = named.pop("max_slice_nums"), named.pop("group_size")
    config: dict[str, Any] = {
        "model_type": "minicpmv",
        "architectures": ["MiniCPMV"],
        "version": 2.6,
        "torch_dtype": dtype,
        **{key: value for key, value in named.items() if key != "scale_resolution"},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_window_layers": sizes.num_hidden_layers,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "image_size": sizes.scale_resolution,
        "patch_size": PATCH,
        "slice_mode": True,
        "slice_config": {"max_slice_nums": slices, "patch_size": PATCH, "model_type": "minicpmv"},
        "drop_vision_last_layer": False,
        "batch_vision_input": True,
        "use_image_id": True,
        "vision_config": {"model_type": "siglip_vision_model", **vision, "patch_size": PATCH},
    }
    if quantization:
        config["quantization_config"] = awq_config(group_size, ["vpm", "resampler"])
    return config
