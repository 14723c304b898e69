"""Counted costs against torch's counter and against the bytes of real parameters, on random sizes."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from huoyan.layers.int4 import Int4Linear
from huoyan.layers.int8 import Int8Linear, round_to_int8
from huoyan.models import costs
from huoyan.models.config import ModelConfig, parse_model_config
from huoyan.models.costs import Cost, Speed, WeightFormat
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.weights import build_model, quantize_randomly


def random_config(seed: int) -> ModelConfig:
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3])
    vision_heads = rng.choice([1, 2, 3])
    width = 128 * rng.choice([1, 2])
    return parse_model_config(
        {
            "model_type": "minicpmv", "version": 2.6, "hidden_size": width,
            "intermediate_size": 64 * rng.randint(1, 5), "num_hidden_layers": rng.randint(1, 3),
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 64 * rng.randint(1, 2),
            "vocab_size": rng.randint(300, 900), "max_position_embeddings": 512,
            "query_num": rng.choice([9, 16, 25]),
            "vision_config": {
                # Sometimes as wide as the decoder: then the resampler has one matrix less.
                "hidden_size": rng.choice([width, 24 * vision_heads]) if width % vision_heads == 0
                else 24 * vision_heads,
                "image_size": 14 * rng.randint(4, 9), "intermediate_size": rng.randint(20, 90),
                "num_attention_heads": vision_heads, "num_hidden_layers": rng.randint(1, 3), "patch_size": 14,
            },
        }
    )  # fmt: skip


class CausalAttend:
    """Each token's attention by itself over what it sees: nothing masked is computed, and so nothing counted."""

    def __init__(self, cached: list[int], tokens: list[int]) -> None:
        self.cached, self.tokens = cached, tokens

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, at = [], 0
        for cached, tokens in zip(self.cached, self.tokens, strict=True):
            for i in range(tokens):
                keys = torch.zeros(q.shape[1], cached + i + 1, q.shape[2])
                scores = q[at + i].unsqueeze(1) @ keys.transpose(1, 2)
                out.append((scores @ keys).squeeze(1))
            at += tokens
        return torch.stack(out)


def counted(model: MiniCPMV, cached: list[int], tokens: list[int]) -> int:
    """Operations of the decoder over sequences, and of the logits of each one's last token."""
    x = torch.zeros(sum(tokens), model.config.text.hidden_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.decoder(x, torch.arange(len(x)), CausalAttend(cached, tokens))
        model.logits(hidden[: len(tokens)])
    return counter.get_total_flops()


def nbytes(*modules: nn.Module) -> int:
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(tensor.nbytes for tensor in tensors)


def test_encode(seed: int) -> None:
    config = random_config(seed)
    model = build_model(config, seed=seed)
    rng = random.Random(seed)
    grids = [(rng.randint(1, 6), rng.randint(1, 6)) for _ in range(rng.randint(1, 4))]
    patches = [rows * columns for rows, columns in grids]
    x = torch.zeros(sum(patches), 3 * 14 * 14)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        made = model.encode_patches(x, grids)
    cost = costs.encode(config, patches, WeightFormat(4))
    assert cost.flops == counter.get_total_flops()
    # The pixels come as bytes.
    assert cost.bytes == nbytes(model.vpm, model.resampler) + x.numel() + made.nbytes


def test_prefill_and_decode(seed: int) -> None:
    config = random_config(seed)
    model = build_model(config, seed=seed)
    rng = random.Random(seed)
    decoder = nbytes(model.llm.model.layers, model.llm.model.norm)
    head = nbytes(model.llm.lm_head)
    assert costs.decoder_bytes(config.text, WeightFormat(4)) == decoder
    assert costs.head_bytes(config.text, WeightFormat(4)) == head

    tokens, cached = rng.randint(1, 20), rng.choice([0, rng.randint(1, 30)])
    cost = costs.prefill(config, tokens, WeightFormat(4), cached=cached)
    assert cost.flops == counted(model, [cached], [tokens])
    token = 2 * config.text.num_hidden_layers * config.text.num_key_value_heads * config.text.head_dim * 4
    embedded = tokens * config.text.hidden_size * 4
    assert cost.bytes == decoder + head + embedded + (tokens + cached) * token

    contexts = [rng.randint(1, 40) for _ in range(rng.randint(1, 5))]
    step = costs.decode_step(config, contexts, WeightFormat(4))
    assert step.flops == counted(model, [length - 1 for length in contexts], [1] * len(contexts))
    embedded = len(contexts) * config.text.hidden_size * 4
    assert step.bytes == decoder + head + embedded + sum(contexts) * token


def test_shared_tokens_are_read_once_and_seen_by_all(seed: int) -> None:
    config = random_config(seed)
    rng = random.Random(seed)
    shared, own, beams = rng.randint(1, 100), rng.randint(1, 9), rng.randint(1, 4)
    contexts = [shared + own] * beams
    apart = costs.decode_step(config, contexts, WeightFormat(), kv_token=1000)
    together = costs.decode_step(config, contexts, WeightFormat(), kv_token=1000, shared=shared)
    assert together.flops == apart.flops
    assert apart.bytes - together.bytes == 1000 * shared * (beams - 1)


@pytest.mark.parametrize("group_size", [32, 64])
def test_int4_is_what_the_layers_hold(seed: int, group_size: int) -> None:
    config = random_config(seed)
    model = build_model(config, seed=seed, dtype=torch.bfloat16)
    # The form without padding, whatever the device would choose.
    quantize_randomly(model, group_size, seed)
    held = sum(
        m.packed.numel() * m.packed.itemsize + m.scales.nbytes + (0 if m.packing == "cpu" else m.zeros.nbytes)
        for m in model.modules()
        if isinstance(m, Int4Linear)
    )
    whole = costs.decoder_bytes(config.text, WeightFormat(2, group_size))
    none = costs.decoder_bytes(config.text, WeightFormat(2, group_size, int4_modules=frozenset()))
    matrices = config.text.num_hidden_layers * costs.layer_values(config.text)
    assert none == costs.decoder_bytes(config.text, WeightFormat(2))
    assert held == whole - (none - 2 * matrices)


def test_an_int8_head_is_what_the_layer_holds(seed: int) -> None:
    config = random_config(seed)
    model = build_model(config, seed=seed, dtype=torch.bfloat16)
    head = Int8Linear(round_to_int8(model.llm.lm_head.weight))
    assert costs.head_bytes(config.text, WeightFormat(2, int8_head=True)) == nbytes(head)


def test_the_published_sizes_by_hand() -> None:
    """14.14 GB a token in 16 bits and 4.55 in int4; 57 344 bytes of keys and values a token."""
    from huoyan.bench.checkpoint_shapes import SHAPES, config_of

    config = parse_model_config(config_of(SHAPES["full"], "bfloat16", None))
    assert costs.kv_token_bytes(config.text) == 2 * 28 * 4 * 128 * 2 == 57_344
    dense = costs.decode_step(config, [1], WeightFormat())
    int4 = costs.decode_step(config, [1], WeightFormat(2, 128))
    assert dense.bytes == pytest.approx(14.14e9, rel=1e-3)
    assert int4.bytes == pytest.approx(4.554e9, rel=1e-3)
    # Two operations a value, and next to nothing else.
    assert dense.flops == pytest.approx(dense.bytes, rel=1e-3)


def test_time_is_the_longer_of_two() -> None:
    speed = Speed(bytes_per_s=100, flops_per_s=1000)
    assert Cost(200, 1000).seconds(speed) == 2
    assert Cost(200, 5000).seconds(speed) == 5
    assert (Cost(1, 2) + Cost(3, 4)) * 2 == Cost(8, 12)


def test_no_torch() -> None:
    code = "import sys, huoyan.models.costs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
