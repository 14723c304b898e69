"""The dense product of a few rows against the plain one, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from huoyan.kernels.dense_matmul import Tuning, dense_matmul, dense_matmul_reference


def operands(
    seed: int, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(m, k, generator=g),
        torch.randn(n, k, generator=g),
        torch.randn(n, generator=g),
    )
    return tuple(t.to(device, dtype) for t in (x, weight * k**-0.5, bias))


def error(got: Tensor, want: Tensor) -> float:
    got = got.float().sum(0) if got.dim() == 3 else got.float()
    assert torch.isfinite(got).all()
    return float((got - want).norm() / want.norm())


def check(
    seed: int, device: torch.device, m: int, n: int, k: int, dtype: torch.dtype, tuning: Tuning | None
) -> None:
    bound = 5e-3 if dtype == torch.bfloat16 else 1e-3
    x, weight, bias = operands(seed, m, n, k, dtype, device)
    expected = dense_matmul_reference(x, weight)
    assert error(dense_matmul(x, weight, parts=True, tuning=tuning), expected) < bound
    if tuning is not None and tuning.split > 1:
        return
    wide = dense_matmul(x, weight, dtype=torch.float32, tuning=tuning)
    assert wide.dtype == torch.float32
    # What the matrix units lose where they add up 18944 products in one go.
    assert error(wide, expected) < 5e-5
    assert error(dense_matmul(x, weight, bias, tuning=tuning), expected + bias.float()) < bound
    gate, other = expected[:, : n // 2 * 2].chunk(2, dim=1)
    got = dense_matmul(x, weight[: n // 2 * 2], gated=True, tuning=tuning)
    assert error(got, torch.nn.functional.silu(gate) * other) < 2 * bound


@pytest.mark.parametrize("tuning", [None, Tuning(64, 3, 4, 3, 2, 64), Tuning(128, 1, 4, 3, 0, 128)])
@pytest.mark.parametrize("m, n, k", [(1, 40, 256), (3, 130, 512), (16, 64, 384)])
def test_product(seed: int, device: torch.device, m: int, n: int, k: int, tuning: Tuning | None) -> None:
    check(seed, device, m, n, k, torch.float16, tuning)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize("n, k", [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (151666, 3584)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_size(seed: int, device: torch.device, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(seed, device, m, n, k, dtype, None)
