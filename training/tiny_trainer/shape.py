"""The sizes of `tiny` and the files around its weights, laid out as the published checkpoints are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATCH_SIZE = 14
SCALE_RESOLUTION = 224
QUERIES = 64


def config_json(vocab_size: int, stop_id: int, pad_id: int) -> dict[str, Any]:
    """`config.json`. Every width of the language model is a multiple of 128, so int4 groups of 128 apply."""
    return {
        "model_type": "minicpmv",
        "architectures": ["MiniCPMV"],
        "version": 2.6,
        "torch_dtype": "bfloat16",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 8192,
        "max_window_layers": 5,
        "use_sliding_window": False,
        "sliding_window": 8192,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab_size,
        "bos_token_id": pad_id,
        "eos_token_id": stop_id,
        "pad_token_id": pad_id,
        "query_num": QUERIES,
        "image_size": SCALE_RESOLUTION,
        "patch_size": PATCH_SIZE,
        "slice_mode": True,
        "slice_config": {"max_slice_nums": 9, "patch_size": PATCH_SIZE, "model_type": "minicpmv"},
        "drop_vision_last_layer": False,
        "batch_vision_input": True,
        "use_image_id": True,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 288,
            "image_size": 448,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "patch_size": PATCH_SIZE,
        },
    }


def preprocessor_config_json() -> dict[str, Any]:
    """`preprocessor_config.json`: as published, but a slice is about 224 by 224 pixels."""
    from huoyan.bench.text_files import PREPROCESSOR

    own = {"scale_resolution": SCALE_RESOLUTION, "patch_size": PATCH_SIZE, "image_feature_size": QUERIES}
    return {**PREPROCESSOR, **own}


def generation_config_json(stop_ids: list[int], pad_id: int) -> dict[str, Any]:
    """`generation_config.json`: greedy, since the drawings have one right answer."""
    return {
        "bos_token_id": pad_id,
        "eos_token_id": stop_ids,
        "pad_token_id": pad_id,
        "do_sample": False,
        "temperature": 0.0,
    }


def write_configs(folder: Path) -> None:
    """Write the three config files beside a tokenizer that is already in `folder`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stop = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    size = tokenizer.get_vocab_size()
    vocab = (size + 127) // 128 * 128
    files = {
        "config.json": config_json(vocab, stop[0], stop[1]),
        "preprocessor_config.json": preprocessor_config_json(),
        "generation_config.json": generation_config_json(stop, stop[1]),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
