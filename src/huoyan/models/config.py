"""The model's sizes, read from a checkpoint's `config.json`. Nothing here is assumed from the version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huoyan.errors import ModelError

SUPPORTED_VERSIONS = ("2.6",)

_T = TypeVar("_T")


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP encoder (`vpm`)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6
    num_channels: int = 3
    drop_last_layer: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patches_per_side(self) -> int:
        """Side of the grid of learned positions (70 in the published model)."""
        return self.image_size // self.patch_size

    @property
    def num_encoder_layers(self) -> int:
        """Layers that are run."""
        return self.num_hidden_layers - int(self.drop_last_layer)


@dataclass(frozen=True)
class TextConfig:
    """The Qwen2 decoder (`llm`)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A MiniCPM-V model: an encoder, a resampler of `query_num` queries a slice, a decoder."""

    version: str
    text: TextConfig
    vision: VisionConfig
    query_num: int
    dtype: str = "bfloat16"
    quantization: Mapping[str, Any] | None = None

    @property
    def resampler_heads(self) -> int:
        """The resampler's heads are 128 wide, whatever the decoder's are."""
        return max(self.text.hidden_size // 128, 1)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        ModelError: the file is missing, unreadable, or holds no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}: it is not a complete MiniCPM-V checkpoint; download it again"
        ) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} cannot be read as JSON ({reason}): download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object: download it again")
    return value


def read_model_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a checkpoint folder.

    Raises:
        ModelError: it is missing, names another model or an unsupported version, or lacks a size.
    """
    path = folder / "config.json"
    return parse_model_config(read_json(path), str(path))


def parse_model_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Turn the contents of `config.json` into sizes; `where` names it in errors."""
    model_type = raw.get("model_type")
    if model_type != "minicpmv":
        raise ModelError(
            f"{where} says model_type {model_type!r}: huoyan runs MiniCPM-V checkpoints ('minicpmv')"
        )
    version = str(raw.get("version", "2.0"))
    if version not in SUPPORTED_VERSIONS:
        raise ModelError(
            f"{where} says version {version}: huoyan runs MiniCPM-V {', '.join(SUPPORTED_VERSIONS)}; "
            "for other versions use vLLM or transformers"
        )
    if raw.get("use_sliding_window"):
        raise ModelError(f"{where} asks for sliding-window attention, which no published MiniCPM-V uses")
    if raw.get("rope_scaling"):
        raise ModelError(
            f"{where} asks for rope_scaling, which huoyan does not have; remove it to run without"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{where} says hidden_act {raw['hidden_act']!r}: Qwen2 uses 'silu'")
    vision_raw = _field(raw, "vision_config", dict, where)
    vision_where = f"{where}, vision_config"
    vision = VisionConfig(
        hidden_size=_field(vision_raw, "hidden_size", int, vision_where),
        intermediate_size=_field(vision_raw, "intermediate_size", int, vision_where),
        num_hidden_layers=_field(vision_raw, "num_hidden_layers", int, vision_where),
        num_attention_heads=_field(vision_raw, "num_attention_heads", int, vision_where),
        image_size=_field(vision_raw, "image_size", int, vision_where),
        patch_size=_field(vision_raw, "patch_size", int, vision_where),
        layer_norm_eps=float(vision_raw.get("layer_norm_eps", 1e-6)),
        drop_last_layer=bool(raw.get("drop_vision_last_layer", False)),
    )
    heads = _field(raw, "num_attention_heads", int, where)
    hidden = _field(raw, "hidden_size", int, where)
    text = TextConfig(
        hidden_size=hidden,
        intermediate_size=_field(raw, "intermediate_size", int, where),
        num_hidden_layers=_field(raw, "num_hidden_layers", int, where),
        num_attention_heads=heads,
        num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
        vocab_size=_field(raw, "vocab_size", int, where),
        max_position_embeddings=_field(raw, "max_position_embeddings", int, where),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )
    _check_divides("num_attention_heads", text.num_attention_heads, "num_key_value_heads",
                   text.num_key_value_heads, where)  # fmt: skip
    _check_divides("hidden_size", vision.hidden_size, "num_attention_heads",
                   vision.num_attention_heads, vision_where)  # fmt: skip
    if text.hidden_size % 128:
        raise ModelError(f"{where} says hidden_size {hidden}: the resampler needs a multiple of 128")
    quantization = raw.get("quantization_config")
    return ModelConfig(
        version=version,
        text=text,
        vision=vision,
        query_num=_field(raw, "query_num", int, where),
        dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"),
        quantization=quantization if isinstance(quantization, Mapping) else None,
    )


def awq_config(group_size: int, kept: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of AutoAWQ's "GEMM" layout; `kept`: names of what stays in 16 bits."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(kept),
    }


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """transformers 5 writes it under `rope_parameters`, earlier ones at top level."""
    parameters = raw.get("rope_parameters")
    if "rope_theta" not in raw and isinstance(parameters, Mapping):
        return float(parameters.get("rope_theta", 1e6))
    return float(raw.get("rope_theta", 1e6))


def _field(raw: Mapping[str, Any], name: str, kind: type[_T], where: str) -> _T:
    value = raw.get(name)
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or int(str(value)) <= 0)):
        raise ModelError(f"{where} has no usable {name} (found {value!r}): download the checkpoint again")
    return value


def _check_divides(whole: str, a: int, part: str, b: int, where: str) -> None:
    if a % b:
        raise ModelError(
            f"{where} says {whole} {a} and {part} {b}: the first must be a multiple of the second"
        )
