"""The picture encoder's kernels against plain PyTorch, on fresh random inputs."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from huoyan.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from huoyan.kernels.slice_attention import slice_attention, slice_attention_reference, takes
from huoyan.layers.linear import Linear, gelu_of
from tests.kernels.test_decode_kernels import near


@pytest.mark.parametrize("width", [64, 288, 1152])
@pytest.mark.parametrize("has_residual", [True, False])
def test_add_layer_norm(seed: int, device: torch.device, width: int, has_residual: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    rows = random.Random(seed).randint(1, 9)
    # Far from zero, so that a variance by differences of large sums would show.
    x = (torch.randn(rows, width, generator=g) + 5).half().to(device)
    residual = torch.randn(rows, width, generator=g).half().to(device) if has_residual else None
    weight, bias = (torch.randn(width, generator=g).half().to(device) for _ in range(2))
    given, given_residual = x.clone(), None if residual is None else residual.float()
    added = torch.randn(width, generator=g).half().to(device) if has_residual and seed % 2 else None
    normed, total = add_layer_norm(x, residual, weight, bias, 1e-6, added)
    assert total is (x if residual is None else residual)
    assert (normed is x) == has_residual
    want, want_total = add_layer_norm_reference(
        given.float(),
        given_residual,
        weight.float(),
        bias.float(),
        1e-6,
        None if added is None else added.float(),
    )
    near(normed, want, 2e-3)
    near(total, want_total, 1e-3)


@pytest.mark.parametrize("heads, dim", [(4, 72), (2, 80), (3, 40)])
def test_slice_attention(seed: int, device: torch.device, heads: int, dim: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    lengths = [rng.choice([1, 16, 63, 64, 65, 128, 129, 200]) for _ in range(rng.randint(1, 4))]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    qkv = torch.randn(sum(lengths), 3, heads, dim, generator=g).half().to(device)
    q, k, v = qkv.unbind(1)
    assert takes(dim)
    got = slice_attention(q, k, v, cu, max(lengths))
    near(got, slice_attention_reference(q, k, v, cu), 3e-3)
    bias = torch.randn(3 * heads * dim, generator=g).half().to(device)
    got = slice_attention(q, k, v, cu, max(lengths), bias)
    near(got, slice_attention_reference(q, k, v, cu, bias), 3e-3)


def test_heads_that_it_does_not_take() -> None:
    assert not any(takes(dim) for dim in (64, 128, 96, 76, 20))


@torch.inference_mode()
def test_gelu_of_a_product(seed: int, device: torch.device) -> None:
    g = torch.Generator().manual_seed(seed)
    linear = Linear(64, (96,), bias=True)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.2
    x = torch.randn(33, 64, generator=g)
    want = torch.nn.functional.gelu(linear(x), approximate="tanh")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    near(gelu_of(linear.to(device, dtype), x.to(device, dtype)).cpu(), want, 2e-3)
