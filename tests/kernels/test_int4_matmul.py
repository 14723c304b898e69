"""The int4 kernels against the plain product, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from huoyan.kernels.int4_cuts import Tuning, choose, takes
from huoyan.kernels.int4_matmul import int4_matmul, int4_matmul_reference
from huoyan.kernels.int4_unpack import dequantize
from huoyan.kernels.int4_words import (
    dequantize_reference,
    pack_meta,
    pack_words,
    paired,
    unpack_meta,
    unpack_words,
    unpaired,
)
from tests.kernels.interpreter import skip_bfloat16_products


def operands(seed: int, m: int, n: int, k: int, group: int, dtype: torch.dtype, device: torch.device):
    """x [m, k], words and meta of a matrix [n, k], a bias [n]."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scales = ((torch.rand(n, k // group, generator=g) + 0.5) * 0.2 * k**-0.5).to(dtype)
    zeros = torch.randint(0, 17, (n, k // group), generator=g)
    x = torch.randn(m, k, generator=g).to(dtype)
    bias = torch.randn(n, generator=g).to(dtype)
    packed = pack_words(q.to(device)), pack_meta(scales.to(device), zeros.to(device), dtype)
    return x.to(device), *packed, bias.to(device)


def error(got: Tensor, want: Tensor) -> float:
    got = got.float().sum(0) if got.dim() == 3 else got.float()
    assert torch.isfinite(got).all()
    return float((got - want).norm() / want.norm())


def bound(dtype: torch.dtype) -> float:
    return 5e-3 if dtype == torch.bfloat16 else 1e-3


def test_words_round_trip(seed: int) -> None:
    q = torch.randint(0, 16, (70, 384), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = pack_words(q)
    assert words.shape == (2, 3, 64, 16)
    back = unpack_words(words)
    assert torch.equal(back[:70], q)
    assert not back[70:].any()
    # Output 65, input 2 * 128 + 32 * 3 + 16 * 1 + 8 * 0 + 2 * 2 + 1
    assert (int(words[1, 2, 1, 3 * 4 + 2]) >> (4 * (2 * 1 + 0 + 4 * 1))) & 15 == int(q[65, 256 + 96 + 16 + 5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_meta_round_trip(seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    scales, zeros = torch.randn(5, 3, generator=g), torch.randint(0, 17, (5, 3), generator=g)
    got_scales, got_zeros = unpack_meta(pack_meta(scales, zeros, dtype), dtype)
    assert torch.equal(got_scales, scales.to(dtype))
    assert torch.equal(got_zeros.float(), zeros.float())


TUNINGS = [
    Tuning(block_n=64, split=1, warps=4, stages=3),
    Tuning(block_n=128, split=3, warps=4, stages=2, prefetch=2),
    Tuning(block_n=64, split=1, warps=4, stages=3, scaled=True),
    Tuning(block_n=64, split=1, warps=4, stages=3, block_m=32, scaled=True, wave=2, tail=3),
    Tuning(block_n=64, split=1, warps=4, stages=3, block_m=64, scaled=True, tiles=True),
    Tuning(block_n=128, split=2, warps=8, stages=2, block_m=32, scaled=True, tiles=True, registers=128),
    None,
]


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize(
    "m, n, k, group",
    [
        (1, 40, 640, 128),
        (3, 130, 512, 64),
        (4, 24, 384, 32),
        (2, 64, 512, 512),
        (20, 70, 256, 128),
        (210, 70, 256, 128),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product(
    seed: int,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    group: int,
    dtype: torch.dtype,
    tuning: Tuning | None,
) -> None:
    skip_bfloat16_products(device, dtype)
    x, words, meta, bias = operands(seed, m, n, k, group, dtype, device)
    expected = int4_matmul_reference(x, words, meta)
    assert error(int4_matmul(x, words, meta, parts=True, tuning=tuning), expected) < bound(dtype)
    whole = int4_matmul(x, words, meta, bias, parts=True, tuning=tuning)
    # Whoever sums parts adds the bias.
    assert error(whole, expected + (bias.float() if whole.dim() == 2 else 0)) < bound(dtype)
    if tuning is None or tuning.split == 1:
        got = int4_matmul(x, words, meta, bias, tuning=tuning)
        assert got.dtype == dtype
        assert error(got, expected + bias.float()) < bound(dtype)


def test_pairs_round_trip(seed: int) -> None:
    rows = torch.randn(192, 5, generator=torch.Generator().manual_seed(seed))
    ordered = paired(rows)
    assert torch.equal(unpaired(ordered), rows)
    # 32 of the gate, the 32 they are multiplied with, the next.
    assert torch.equal(ordered[:32], rows[:32])
    assert torch.equal(ordered[32:64], rows[96:128])
    assert torch.equal(ordered[64:96], rows[32:64])


@pytest.mark.parametrize("tuning", [t for t in TUNINGS if t is None or t.split == 1])
@pytest.mark.parametrize("m, n, k, group", [(1, 64, 640, 128), (3, 192, 512, 64), (20, 320, 256, 32)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate(
    seed: int,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    group: int,
    dtype: torch.dtype,
    tuning: Tuning | None,
) -> None:
    skip_bfloat16_products(device, dtype)
    x, words, meta, _ = operands(seed, m, n, k, group, dtype, device)
    gate, other = (x.float() @ unpaired(dequantize_reference(words, meta, dtype)).T).chunk(2, 1)
    want = torch.nn.functional.silu(gate) * other
    torch.testing.assert_close(int4_matmul_reference(x, words, meta, gated=True), want)
    got = int4_matmul(x, words, meta, gated=True, tuning=tuning)
    assert got.dtype == dtype
    assert got.shape == (m, n // 2)
    # Two sums are multiplied, each with an error of its own.
    assert error(got, want) < 2**0.5 * bound(dtype)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_dequantize(seed: int, device: torch.device, group: int, pairs: bool) -> None:
    n = 192 if pairs else 150
    _, words, meta, _ = operands(seed, 1, n, 512, group, torch.float16, device)
    want = dequantize_reference(words, meta, torch.float16)
    want = unpaired(want) if pairs else want
    for start, stop in ((0, n), (64, 130)):
        out = torch.full((stop - start, 512), torch.nan, dtype=torch.float16, device=device)
        got = dequantize(words, meta, start, stop, out, pairs=pairs).float()
        torch.testing.assert_close(got, want[start:stop], rtol=1e-3, atol=1e-4)


def test_every_number_of_rows_is_cut_somehow() -> None:
    for m in range(1, 1025):
        assert choose(m, 3584, 3584, True).block_m >= min(m, 32)


def test_hundreds_of_rows_fill_the_processors() -> None:
    for m, split, block_m in (
        (192, 2, 64),
        (256, 2, 128),
        (384, 3, 128),
        (512, 1, 128),
        (576, 3, 64),
        (768, 3, 128),
    ):
        cut = choose(m, 3584, 18944, True)
        assert (cut.split, cut.block_m) == (split, block_m)
    assert choose(384, 37888, 3584, True).split == 1
    card = torch.device("cpu")
    assert [takes(m, 37888, 3584, card) for m in (192, 1024, 1025)] == [True, True, False]
    assert [takes(m, 4608, 3584, card) for m in (384, 385)] == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 4, 16, 24, 48, 128, 192, 300, 576, 1024])
@pytest.mark.parametrize("n, k", [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_size(seed: int, device: torch.device, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, words, meta, bias = operands(seed, m, n, k, 128, dtype, device)
    expected = int4_matmul_reference(x, words, meta)
    assert error(int4_matmul(x, words, meta, bias), expected + bias.float()) < bound(dtype)
    assert error(int4_matmul(x, words, meta, parts=True), expected) < bound(dtype)
    if n > 2 * k:
        want = int4_matmul_reference(x, words, meta, gated=True)
        assert error(int4_matmul(x, words, meta, gated=True), want) < bound(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 100, 192, 193, 800, 2048])
def test_gates(seed: int, device: torch.device, rows: int) -> None:
    """By our kernel, or in pieces, beside the product with the whole matrix."""
    from huoyan.kernels.silu_mul import silu_mul_reference
    from huoyan.layers import int4
    from huoyan.layers.int4 import Int4Linear, Int4Weight

    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (2 * 18944, 3584), generator=g, dtype=torch.uint8)
    scales = torch.rand(2 * 18944, 28, generator=g) / 300
    weight = Int4Weight(q, scales, torch.full_like(scales, 8.0))
    linear = Int4Linear(weight, None, dtype=torch.bfloat16, device=device, gated=True)
    assert linear.packing == "words"
    assert linear.pairs
    x = torch.randn(rows, 3584, generator=g).to(device, torch.bfloat16)
    with torch.inference_mode():
        stream = torch.cuda.current_stream(device).cuda_stream
        int4.forget_scratches(stream)
        int4.reserve_scratch(torch.nn.ModuleList([linear]), x)
        (scratch,) = [kept for key, kept in int4._SCRATCHES.items() if key[2] == stream]
        whole = weight.dequantize().to(device, torch.bfloat16)
        assert error(linear(x), x.float() @ whole.float().T) < bound(torch.bfloat16)
        want = silu_mul_reference(x.float() @ whole.float().T)
        assert error(linear.gated(x).float(), want.float()) < bound(torch.bfloat16)
        # Graphs know where it lies.
        assert [kept is scratch for key, kept in int4._SCRATCHES.items() if key[2] == stream] == [True]
