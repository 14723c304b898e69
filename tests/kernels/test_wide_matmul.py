"""Products of some rows with a large dense matrix, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from huoyan.kernels import wide_matmul as wide
from huoyan.kernels.wide_matmul import Tuning, choose, takes, wide_matmul, wide_matmul_reference


def error(got: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.float() - expected).norm() / expected.norm())


def check(
    seed: int,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    gated: bool,
    tuning: Tuning | None,
) -> None:
    g = torch.Generator(device).manual_seed(seed)
    x, weight = (torch.randn(size, k, generator=g, device=device).to(dtype) for size in (m, n))
    got = wide_matmul(x, weight, gated=gated, tuning=tuning)
    expected = wide_matmul_reference(x, weight, gated)
    if got.dim() == 3:
        assert got.dtype is torch.float32
        # What the matrix units lose where they add up thousands of products in one go.
        assert error(got.sum(0), expected) < 5e-5
        return
    assert got.dtype is dtype
    assert error(got, expected) < {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(32, 16, 1, 64, 4, 2, 2),
        Tuning(64, 16, 1, 32, 4, 3),
        Tuning(64, 0, 3, 64, 4, 2),
        Tuning(16, 0, 1, 128, 4, 2),
    ],
)
@pytest.mark.parametrize("m, n, k", [(17, 160, 256), (40, 96, 384)])
def test_wide_product(
    seed: int, device: torch.device, m: int, n: int, k: int, gated: bool, tuning: Tuning
) -> None:
    """Tiles that end in the middle, also of the gate; fewer rows than the next power of two."""
    if tuning.split > 1 and gated:
        pytest.skip("a gate is not parted")
    check(seed, device, m, n, k, torch.float16, gated, tuning)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [17, 32, 64, 96, 128])
@pytest.mark.parametrize(
    "n, k, gated",
    [
        (37888, 3584, True),
        (3584, 18944, False),
        (8192, 4096, True),
        (4608, 3584, False),
        (3584, 3584, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_size(
    seed: int, device: torch.device, m: int, n: int, k: int, gated: bool, dtype: torch.dtype
) -> None:
    x, weight = (torch.empty(size, k, device=device, dtype=dtype) for size in (m, n))
    with torch.no_grad():
        used = takes(x, weight, gated)
    del x, weight
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("this card takes another way")
    assert used == (gated or 2 * n <= k or (m > 64) == (n > k))
    check(seed, device, m, n, k, dtype, gated, None)


def test_the_published_gate_is_one_tile_a_processor() -> None:
    assert [choose(m, 18944, 3584, True, 132).rest for m in (32, 128)] == [16, 16]
    assert choose(128, 128 * 132, 3584, True, 132).rest == 0
    assert choose(128, 3584, 18944, False, 132).split == 4
    assert choose(128, 4608, 3584, False, 132).split == 3
    assert choose(128, 100_000, 3584, False, 132).split == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_full_size has the kernel itself")
def test_the_probe_knows_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    works = wide.wide_matmul
    assert wide._works.__wrapped__(device, torch.float16)

    def one_is_off(x: Tensor, weight: Tensor, **options: object) -> Tensor:
        got = works(x, weight, **options)  # type: ignore[arg-type]
        got[..., -1, -1] += got.norm() / 20
        return got

    monkeypatch.setattr(wide, "wide_matmul", one_is_off)
    assert not wide._works.__wrapped__(device, torch.float16)

    def fails(x: Tensor, weight: Tensor, **options: object) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(wide, "wide_matmul", fails)
    assert not wide._works.__wrapped__(device, torch.float16)
