"""Small models and checkpoint folders for the tests of this area."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from huoyan.models.config import ModelConfig, parse_model_config
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.weights import build_model, save_published

VISION = {
    "hidden_size": 144,
    "image_size": 280,
    "intermediate_size": 200,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 14,
}
CONFIG = {
    "model_type": "minicpmv",
    "architectures": ["MiniCPMV"],
    "version": 2.6,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "query_num": 16,
    "torch_dtype": "float32",
    "vision_config": VISION,
}


def small_config(**changes: object) -> ModelConfig:
    return parse_model_config({**CONFIG, **changes})


def small_model(seed: int, **changes: object) -> MiniCPMV:
    """Random in every parameter, norms too, so that no term can go missing unseen."""
    model = build_model(small_config(**changes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def write_checkpoint(folder: Path, model: MiniCPMV, shard_bytes: int = 400_000, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_published(model, folder, dtype=torch.float32, shard_bytes=shard_bytes)
    return folder
