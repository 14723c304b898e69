"""The model against plain transcriptions of its description, and against transformers' Qwen2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from huoyan.layers.packed_attention import packed_attention, packed_attention_by_runs
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.patches import cut_patches, normalise
from tests.models.small import VISION, small_model


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def pixels(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return rng.integers(0, 256, (14 * rows, 14 * columns, 3), dtype=np.uint8)


def plain_encode(model: MiniCPMV, image: np.ndarray) -> Tensor:
    """One slice in float64, a patch and a head at a time."""
    state = {n: p.double() for n, p in model.named_parameters()}
    vision, text = model.config.vision, model.config.text
    x = torch.from_numpy(((image.astype(np.float64) / 255) - 0.5) / 0.5)
    rows, columns = image.shape[0] // 14, image.shape[1] // 14
    side = vision.image_size // 14
    tokens = []
    for i in range(rows):
        for j in range(columns):
            patch = x[14 * i : 14 * i + 14, 14 * j : 14 * j + 14].permute(2, 0, 1).reshape(-1)
            bucket = min(int(side * i / rows + 1e-9), side - 1) * side + min(
                int(side * j / columns + 1e-9), side - 1
            )
            tokens.append(
                state["vpm.embeddings.patch_embedding.weight"] @ patch
                + state["vpm.embeddings.patch_embedding.bias"]
                + state["vpm.embeddings.position_embedding.weight"][bucket]
            )
    h = torch.stack(tokens)

    def norm(y: Tensor, name: str) -> Tensor:
        return layer_norm(y, y.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-6)

    for layer in range(vision.num_hidden_layers):
        p = f"vpm.encoder.layers.{layer}."
        y = norm(h, p + "layer_norm1")
        qkv = y @ state[p + "self_attn.qkv_proj.weight"].T + state[p + "self_attn.qkv_proj.bias"]
        q, k, v = qkv.chunk(3, dim=-1)
        heads = []
        width = vision.head_dim
        for head in range(vision.num_attention_heads):
            s = slice(head * width, head * width + width)
            heads.append(((q[:, s] @ k[:, s].T) / math.sqrt(width)).softmax(-1) @ v[:, s])
        h = h + torch.cat(heads, -1) @ state[p + "self_attn.out_proj.weight"].T
        h = h + state[p + "self_attn.out_proj.bias"]
        y = norm(h, p + "layer_norm2")
        y = gelu(y @ state[p + "mlp.fc1.weight"].T + state[p + "mlp.fc1.bias"], approximate="tanh")
        h = h + y @ state[p + "mlp.fc2.weight"].T + state[p + "mlp.fc2.bias"]
    h = norm(h, "vpm.post_layernorm")

    width = text.hidden_size
    quarter = width // 4
    pos = torch.zeros(rows, columns, width, dtype=torch.float64)
    omega = torch.tensor([10000 ** (-k / quarter) for k in range(quarter)], dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            pos[i, j] = torch.cat(
                [(j * omega).sin(), (j * omega).cos(), (i * omega).sin(), (i * omega).cos()]
            )
    if model.config.vision.hidden_size != width:
        h = h @ state["resampler.kv_proj.weight"].T
    kv = norm(h, "resampler.ln_kv")
    attention = nn.MultiheadAttention(width, width // 128, batch_first=True).double()
    attention.load_state_dict(
        {
            "in_proj_weight": state["resampler.attn.in_proj_weight"],
            "in_proj_bias": state["resampler.attn.in_proj_bias"],
            "out_proj.weight": state["resampler.attn.out_proj.weight"],
            "out_proj.bias": state["resampler.attn.out_proj.bias"],
        }
    )
    q = norm(state["resampler.query"], "resampler.ln_q")
    out = attention(q[None], (kv + pos.flatten(0, 1))[None], kv[None], need_weights=False)[0][0]
    return norm(out, "resampler.ln_post") @ state["resampler.proj"]


@pytest.mark.parametrize("vision_width", [144, 256])
def test_encoder_and_resampler_follow_the_description(seed: int, vision_width: int) -> None:
    rng = np.random.default_rng(seed)
    model = small_model(seed, vision_config={**VISION, "hidden_size": vision_width})
    grids = [(int(rng.integers(1, 9)), int(rng.integers(1, 9))) for _ in range(4)] + [(1, 20), (20, 20)]
    images = [pixels(rng, *grid) for grid in grids]
    got = model.encode_slices(images)
    for image, embeddings in zip(images, got, strict=True):
        expected = plain_encode(model, image)
        assert (embeddings.double() - expected).norm() / expected.norm() < 1e-4


def test_a_slice_does_not_depend_on_its_neighbours(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = small_model(seed)
    images = [pixels(rng, 3, 5), pixels(rng, 5, 3), pixels(rng, 3, 5), pixels(rng, 2, 2)]
    together = model.encode_slices(images)
    for image, embeddings in zip(images, together, strict=True):
        torch.testing.assert_close(model.encode_slices([image])[0], embeddings, rtol=1e-5, atol=1e-5)


def test_packed_attention_runs(seed: int) -> None:
    torch.manual_seed(seed)
    q_lengths, k_lengths = [3, 3, 1, 7, 7, 7, 2], [4, 4, 9, 1, 1, 5, 2]
    q = torch.randn(sum(q_lengths), 2, 24)
    k, v = torch.randn(2, sum(k_lengths), 2, 24)
    expected = torch.cat(
        [
            scaled_dot_product_attention(a.transpose(0, 1), b.transpose(0, 1), c.transpose(0, 1)).transpose(
                0, 1
            )
            for a, b, c in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
        ]
    )
    torch.testing.assert_close(packed_attention(q, k, v, q_lengths, k_lengths), expected)
    with_gradient = packed_attention_by_runs(q.requires_grad_(), k, v, q_lengths, k_lengths)
    torch.testing.assert_close(with_gradient, expected)


def test_decoder_agrees_with_transformers(seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    model = small_model(seed)
    text = model.config.text
    config = transformers.Qwen2Config(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=text.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    from huoyan.models.weights import published_state

    reference = transformers.Qwen2ForCausalLM(config).eval()
    state = {n[4:]: v for n, v in published_state(model).items() if n.startswith("llm.")}
    reference.load_state_dict(state)
    ids = torch.randint(0, text.vocab_size, (70,), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
        hidden = model.decoder(model.embed(ids), torch.arange(70), causal)
        torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean, std", [((0.5,) * 3, (0.5,) * 3), ((0.48, 0.45, 0.4), (0.27, 0.26, 0.28))])
def test_patches_are_the_pixels(seed: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    rng = np.random.default_rng(seed)
    images = [pixels(rng, 2, 3), pixels(rng, 4, 1)]
    patches, grids = cut_patches(images, 14)
    assert grids == [(2, 3), (4, 1)]
    got = normalise(torch.from_numpy(patches), mean, std, torch.float32)
    expected = []
    for image in images:
        x = ((image.astype(np.float32) / 255 - np.array(mean)) / np.array(std)).astype(np.float32)
        for i in range(image.shape[0] // 14):
            for j in range(image.shape[1] // 14):
                expected.append(x[14 * i : 14 * i + 14, 14 * j : 14 * j + 14].transpose(2, 0, 1).reshape(-1))
    np.testing.assert_allclose(got.numpy(), np.stack(expected), rtol=0, atol=3e-7)
