"""The int8 kernels against the plain product, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from huoyan.kernels.int8_matmul import int8_matmul, int8_matmul_reference
from tests.kernels.interpreter import skip_bfloat16_products


def operands(seed: int, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (n, k), generator=g).to(torch.int8)
    scales = (torch.rand(n, generator=g) + 0.5) * 0.02 * k**-0.5
    x = torch.randn(m, k, generator=g).to(dtype)
    return [t.to(device) for t in (x, q, scales)]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 16, 33])
@pytest.mark.parametrize("n, k", [(40, 640), (71, 128), (130, 1152)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product(seed: int, device: torch.device, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    if m > 4:
        skip_bfloat16_products(device, dtype)
    x, q, scales = operands(seed, m, n, k, dtype, device)
    expected = int8_matmul_reference(x, q, scales)
    got = int8_matmul(x, q, scales)
    assert got.dtype is dtype
    assert (got.float() - expected).norm() / expected.norm() < (5e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 16, 64])
def test_full_size(seed: int, device: torch.device, m: int) -> None:
    x, q, scales = operands(seed, m, 151666, 3584, torch.float16, device)
    expected = int8_matmul_reference(x, q, scales)
    got = int8_matmul(x, q, scales).float()
    assert (got - expected).norm() / expected.norm() < 1e-3
