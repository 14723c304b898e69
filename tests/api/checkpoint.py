"""A whole checkpoint folder with random weights, in the published layout, small enough to load at once."""

from __future__ import annotations

import json
from pathlib import Path

from tests.prompt.checkpoint import train, write_folder


def write_checkpoint(folder: Path, seed: int = 0, **config: object) -> Path:
    """64 embeddings a slice and the published tags; a vocabulary of some 1500 tokens."""
    import torch

    from huoyan.models.config import parse_model_config
    from huoyan.models.weights import build_model, save_published

    inner = train()
    write_folder(folder, inner)
    sizes = {
        "model_type": "minicpmv",
        "architectures": ["MiniCPMV"],
        "version": 2.6,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": inner.get_vocab_size(),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "query_num": 64,
        "torch_dtype": "float32",
        "vision_config": {
            "hidden_size": 64,
            "image_size": 980,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 14,
        },
    } | config
    (folder / "config.json").write_text(json.dumps(sizes))
    save_published(build_model(parse_model_config(sizes), seed=seed), folder, dtype=torch.float32)
    return folder
