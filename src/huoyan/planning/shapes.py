"""Names and shapes of a published checkpoint's tensors, from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huoyan.models.config import ModelConfig

Shape = tuple[int, ...]


def published_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The tensors of a 16-bit checkpoint of these sizes, layers that are not run left out."""
    return {**_language(config), **_encoder(config), **_resampler(config)}


def _language(config: ModelConfig) -> dict[str, Shape]:
    text = config.text
    width, inner = text.hidden_size, text.intermediate_size
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    shapes: dict[str, Shape] = {
        "llm.model.embed_tokens.weight": (text.vocab_size, width),
        "llm.model.norm.weight": (width,),
    }
    if not text.tie_word_embeddings:
        shapes["llm.lm_head.weight"] = (text.vocab_size, width)
    for i in range(text.num_hidden_layers):
        layer = f"llm.model.layers.{i}"
        for name, out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            shapes[f"{layer}.self_attn.{name}.weight"] = (out, width)
            shapes[f"{layer}.self_attn.{name}.bias"] = (out,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, q)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, width)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    return shapes


def _encoder(config: ModelConfig) -> dict[str, Shape]:
    vision = config.vision
    width, side = vision.hidden_size, vision.patch_size
    shapes: dict[str, Shape] = {
        "vpm.embeddings.patch_embedding.weight": (width, vision.num_channels, side, side),
        "vpm.embeddings.patch_embedding.bias": (width,),
        "vpm.embeddings.position_embedding.weight": (vision.patches_per_side**2, width),
        "vpm.post_layernorm.weight": (width,),
        "vpm.post_layernorm.bias": (width,),
    }
    for i in range(vision.num_encoder_layers):
        layer = f"vpm.encoder.layers.{i}"
        matrices = {
            f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        }
        matrices["mlp.fc1"] = (vision.intermediate_size, width)
        matrices["mlp.fc2"] = (width, vision.intermediate_size)
        for name, shape in matrices.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (width,)
    return shapes


def _resampler(config: ModelConfig) -> dict[str, Shape]:
    width = config.text.hidden_size
    shapes: dict[str, Shape] = {
        "resampler.query": (config.query_num, width),
        "resampler.proj": (width, width),
        "resampler.attn.in_proj_weight": (3 * width, width),
        "resampler.attn.in_proj_bias": (3 * width,),
        "resampler.attn.out_proj.weight": (width, width),
        "resampler.attn.out_proj.bias": (width,),
    }
    if config.vision.hidden_size != width:
        shapes["resampler.kv_proj.weight"] = (width, config.vision.hidden_size)
    for name in ("ln_q", "ln_kv", "ln_post"):
        shapes[f"resampler.{name}.weight"] = shapes[f"resampler.{name}.bias"] = (width,)
    return shapes
