"""The int4 kernels against the plain product, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from huoyan.kernels.int4_matmul import (
    Tuning,
    dequantize,
    dequantize_reference,
    int4_matmul,
    int4_matmul_reference,
    pack_words,
    unpack_words,
)


def operands(seed: int, m: int, n: int, k: int, group: int, dtype: torch.dtype, device: torch.device):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scales = ((torch.rand(n, k // group, generator=g) + 0.5) * 0.2 * k**-0.5).to(dtype)
    zeros = torch.randint(0, 16, (n, k // group), generator=g).to(dtype)
    x = torch.randn(m, k, generator=g).to(dtype)
    bias = torch.randn(n, generator=g).to(dtype)
    return [t.to(device) for t in (x, pack_words(q), scales, zeros, bias)]


def test_words_round_trip(seed: int) -> None:
    q = torch.randint(0, 16, (6, 384), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = pack_words(q)
    assert torch.equal(unpack_words(words), q)
    row, word, nibble = 3, 2 * 16 + 5, 6
    assert (int(words[row, word]) >> (4 * nibble)) & 15 == int(q[row, 2 * 128 + 16 * nibble + 5])


PLANS = [
    ("rows", Tuning(block_n=4, blocks=2, split=1, warps=4)),
    ("rows", Tuning(block_n=8, blocks=1, split=3, warps=4)),
    ("tile", Tuning(block_n=32, blocks=1, split=1, warps=4)),
    ("tile", Tuning(block_n=16, blocks=1, split=2, warps=4)),
    None,
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "m, n, k, group", [(1, 40, 640, 128), (3, 33, 512, 64), (4, 24, 384, 32), (2, 24, 512, 512)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product(
    seed: int, device: torch.device, m: int, n: int, k: int, group: int, dtype: torch.dtype, plan
) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16 and plan is not None and plan[0] == "tile":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices, not their values")
    x, words, scales, zeros, bias = operands(seed, m, n, k, group, dtype, device)
    expected = int4_matmul_reference(x, words, scales, zeros)
    for added in (None, bias):
        got = int4_matmul(x, words, scales, zeros, added, plan=plan).float()
        want = expected if added is None else expected + added.float()
        error = (got - want).norm() / want.norm()
        assert error < (5e-3 if dtype == torch.bfloat16 else 1e-3), error


@pytest.mark.parametrize("m", [5, 16, 17])
def test_more_rows(seed: int, device: torch.device, m: int) -> None:
    x, words, scales, zeros, _ = operands(seed, m, 72, 512, 128, torch.float16, device)
    expected = int4_matmul_reference(x, words, scales, zeros)
    got = int4_matmul(x, words, scales, zeros).float()
    assert (got - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_dequantize(seed: int, device: torch.device, group: int) -> None:
    _, words, scales, zeros, _ = operands(seed, 1, 50, 512, group, torch.float16, device)
    got = dequantize(words, scales, zeros, torch.float32)
    torch.testing.assert_close(got, dequantize_reference(words, scales, zeros), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 4, 16, 48])
@pytest.mark.parametrize("n, k", [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)])
def test_full_size(seed: int, device: torch.device, m: int, n: int, k: int) -> None:
    x, words, scales, zeros, bias = operands(seed, m, n, k, 128, torch.float16, device)
    expected = int4_matmul_reference(x, words, scales, zeros) + bias.float()
    got = int4_matmul(x, words, scales, zeros, bias).float()
    assert (got - expected).norm() / expected.norm() < 1e-3
