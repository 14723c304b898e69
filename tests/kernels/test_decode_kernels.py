"""The decode step's kernels against plain PyTorch, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from huoyan.engine.kv_format import kv_format
from huoyan.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from huoyan.kernels.arrivals import arrivals
from huoyan.kernels.paged_decode import TILE, paged_decode, paged_decode_reference, parts_for
from huoyan.kernels.rope_cache import rope_cache, rope_cache_reference
from huoyan.kernels.silu_mul import silu_mul, silu_mul_over, silu_mul_reference
from huoyan.layers.kv_numbers import STORED_AS, dequantize, quantize
from huoyan.layers.rope import RotaryTable


def near(got: Tensor, expected: Tensor, bound: float) -> None:
    assert torch.isfinite(got).all()
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < bound, float(error)


def random_cache(
    seed: int, blocks: int, size: int, kv_heads: int, dim: int, device: torch.device
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(blocks, size, kv_heads, dim, generator=g).half().to(device) for _ in range(2)]


EIGHT_BITS = ["int8", "fp8_e4m3", "fp8_e5m2"]


def eight_bits(name: str, cache: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Numbers and scales of keys and values."""
    dim = cache[0].shape[-1]
    pairs = [quantize(x, STORED_AS[name], kv_format(name, dim).group) for x in cache]
    return [numbers for numbers, _ in pairs], [scales for _, scales in pairs]


@pytest.mark.parametrize("heads, kv_heads, dim", [(28, 4, 128), (4, 2, 64), (6, 6, 72), (8, 1, 32)])
@pytest.mark.parametrize("parts", [1, 4, None])
def test_paged_decode(
    seed: int, device: torch.device, heads: int, kv_heads: int, dim: int, parts: int | None
) -> None:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 16, 17, 150, 64, 300], dtype=torch.int32)
    keys, values = random_cache(seed, 64, 16, kv_heads, dim, device)
    tables = torch.stack([torch.randperm(64, generator=g)[:20] for _ in lengths]).int().to(device)
    q = torch.randn(len(lengths), heads, dim, generator=g).half().to(device)
    lengths = lengths.to(device)
    got = paged_decode(q, keys, values, tables, lengths, parts=parts)
    near(got, paged_decode_reference(q, keys, values, tables, lengths), 3e-3)


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("heads, kv_heads, dim, parts", [(14, 2, 128, 2), (4, 2, 64, 1), (3, 3, 72, None)])
def test_paged_decode_of_eight_bits(
    seed: int, device: torch.device, name: str, heads: int, kv_heads: int, dim: int, parts: int | None
) -> None:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 17, 150, 64], dtype=torch.int32)
    (keys, values), scales = eight_bits(name, random_cache(seed, 32, 16, kv_heads, dim, device))
    tables = torch.stack([torch.randperm(32, generator=g)[:10] for _ in lengths]).int().to(device)
    q = torch.randn(len(lengths), heads, dim, generator=g).half().to(device)
    given = (q, keys, values, tables, lengths.to(device), *scales)
    near(paged_decode(*given, parts=parts), paged_decode_reference(*given), 3e-3)


def lengths_of_tiles(g: torch.Generator, parts: int) -> Tensor:
    """Of rows that have work for no part, one, two, several (the last with fewer tiles than others) and all."""
    tiles = [0, 1, 2, 3, parts // 2 + 1, parts, 0, parts + 1]
    lengths = [n * TILE - int(torch.randint(0, TILE, (), generator=g)) if n else 0 for n in tiles]
    return torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("name", ["auto", "int8", "fp8_e4m3"])
@pytest.mark.parametrize(
    "heads, kv_heads, dim, parts", [(6, 2, 72, 1), (7, 1, 32, 2), (6, 2, 72, 8), (7, 1, 32, 32)]
)
def test_parts_are_joined_by_the_last(
    seed: int, device: torch.device, heads: int, kv_heads: int, dim: int, parts: int, name: str
) -> None:
    g = torch.Generator().manual_seed(seed)
    lengths = lengths_of_tiles(g, parts)
    blocks = -(-int(lengths.max()) // 16)
    cache = random_cache(seed, 2 * blocks, 16, kv_heads, dim, device)
    scales: list[Tensor] = []
    if name != "auto":
        cache, scales = eight_bits(name, cache)
    tables = torch.stack([torch.randperm(2 * blocks, generator=g)[:blocks] for _ in lengths]).int().to(device)
    there = lengths > 0
    q, other, before = torch.randn(3, len(lengths), heads, dim, generator=g).half().to(device)
    given = (*cache, tables, lengths.to(device), *scales)

    def answer(queries: Tensor) -> Tensor:
        out = paged_decode(queries, *given, parts=parts, out=before.clone())
        assert not arrivals(len(lengths) * kv_heads, device).any()
        return out

    # Nothing of a launch stays for the next, and whose turn is the last decides nothing.
    first, between, again = answer(q), answer(other), answer(q)
    assert torch.equal(first, again)
    for queries, got in ((q, first), (other, between)):
        near(got[there], paged_decode_reference(queries, *given)[there], 3e-3)
        assert torch.equal(got[~there], before[~there])


def test_counters_are_kept_where_they_lie(device: torch.device) -> None:
    some = arrivals(3, device)
    more = arrivals(len(some) + 1, device)
    assert len(more) > len(some)
    assert arrivals(len(some), device).data_ptr() == some.data_ptr()
    assert arrivals(len(more), device).data_ptr() == more.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
@pytest.mark.parametrize("warm", [True, False])
def test_a_graph_joins_parts_of_other_lengths(seed: int, device: torch.device, warm: bool) -> None:
    """`warm`: with counters that were there before the capture, else with the graph's own."""
    g = torch.Generator().manual_seed(seed)
    keys, values = random_cache(seed, 40, 16, 2, 64, device)
    tables = torch.stack([torch.randperm(40, generator=g) for _ in range(2)]).int().to(device)
    q = torch.randn(2, 8, 64, generator=g).half().to(device)
    lengths = torch.tensor([1, 640], dtype=torch.int32, device=device)
    given = (q, keys, values, tables, lengths)
    paged_decode(*given, parts=8)  # compiled outside of the capture
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if warm:
        with torch.cuda.stream(stream):
            paged_decode(*given, parts=8)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        got = paged_decode(*given, parts=8)
    for now in ([1, 640], [640, 65], [0, 300], [129, 1]):
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        want = paged_decode(*given, parts=8)
        for _ in range(3):
            graph.replay()
            for row, length in enumerate(now):
                assert not length or torch.equal(got[row], want[row])


def test_queries_may_stand_in_a_wider_row(seed: int, device: torch.device) -> None:
    keys, values = random_cache(seed, 8, 16, 2, 64, device)
    wide = torch.randn(3, 8 * 64, generator=torch.Generator().manual_seed(seed)).half().to(device)
    q = wide[:, : 4 * 64].unflatten(1, (4, 64))
    tables = torch.arange(8, dtype=torch.int32, device=device).view(1, 8).repeat(3, 1)
    lengths = torch.tensor([5, 100, 33], dtype=torch.int32, device=device)
    near(
        paged_decode(q, keys, values, tables, lengths),
        paged_decode_reference(q.contiguous(), keys, values, tables, lengths),
        3e-3,
    )


def test_parts_fill_the_device() -> None:
    assert parts_for(1, 4) == 32
    assert parts_for(128, 4) == 1
    assert all(parts_for(b, 4) & (parts_for(b, 4) - 1) == 0 for b in range(1, 300))


@pytest.mark.parametrize("width", [256, 3584, 1000])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm(seed: int, device: torch.device, width: int, with_residual: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(5, width, generator=g).half().to(device) for _ in range(2))
    weight = torch.randn(width, generator=g).half().to(device)
    given = residual if with_residual else None
    normed, total = add_rms_norm(x, given, weight, 1e-6)
    expected, expected_total = add_rms_norm_reference(x, given, weight, 1e-6)
    near(normed, expected, 1e-3)
    assert torch.equal(total, expected_total)
    out = torch.empty_like(x)
    elsewhere = add_rms_norm(x, given, weight, 1e-6, out=out)
    assert elsewhere[0] is out
    assert all(map(torch.equal, elsewhere, (normed, total)))
    again = add_rms_norm(x, given, weight, 1e-6, over=True)
    assert all(map(torch.equal, again, (normed, total)))
    if with_residual:
        assert torch.equal(x, normed)
        assert torch.equal(residual, total)


@pytest.mark.parametrize("width, parts", [(256, 1), (3584, 7), (1000, 4)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm_of_parts(
    seed: int, device: torch.device, width: int, parts: int, with_residual: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(parts, 3, width, generator=g).to(device)
    residual, weight = (torch.randn(rows, width, generator=g).half().to(device) for rows in (3, 1))
    given = residual if with_residual else None
    normed, total = add_rms_norm(x, given, weight[0], 1e-6)
    expected, expected_total = add_rms_norm_reference(x, given, weight[0], 1e-6)
    assert normed.dtype == total.dtype == torch.float16
    near(normed, expected, 2e-3)
    near(total, expected_total, 1e-3)
    out = torch.empty_like(normed)
    assert add_rms_norm(x, given, weight[0], 1e-6, over=True, out=out)[0] is out
    assert torch.equal(out, normed)


@pytest.mark.parametrize("width", [768, 18944, 100])
def test_silu_mul(seed: int, device: torch.device, width: int) -> None:
    x = (3 * torch.randn(4, 2 * width, generator=torch.Generator().manual_seed(seed))).half().to(device)
    expected = silu_mul_reference(x)
    near(silu_mul(x), expected, 1e-3)
    near(silu_mul(x, in_place=True), expected, 1e-3)
    near(x[:, :width], expected, 1e-3)


@pytest.mark.parametrize("width", [768, 1500])
def test_silu_mul_over_rows_that_lie_apart(seed: int, device: torch.device, width: int) -> None:
    x = (3 * torch.randn(4, 3 * width, generator=torch.Generator().manual_seed(seed))).half().to(device)
    gate, rest = x[:, :width], x[:, width:].clone()
    expected = silu_mul_reference(torch.cat([gate, rest[:, :width]], 1))
    silu_mul_over(gate, rest[:, :width])
    near(gate, expected, 1e-3)
    assert torch.equal(x[:, width:], rest)


@pytest.mark.parametrize(
    "heads, kv_heads, dim, name", [(28, 4, 128, "auto"), (4, 2, 64, "int8"), (3, 1, 24, "auto")]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_rope_cache_of_parts(
    seed: int, device: torch.device, heads: int, kv_heads: int, dim: int, name: str, with_bias: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    width = (heads + 2 * kv_heads) * dim
    parts = torch.randn(4, 5, width, generator=g).to(device)
    bias = torch.randn(width, generator=g).half().to(device) if with_bias else None
    positions = torch.randint(0, 500, (5,), generator=g).to(device)
    slots = torch.randperm(6 * 16, generator=g)[:5].to(device)
    table = RotaryTable(dim, 1e6, 512).table(device)
    cache = random_cache(seed, 6, 16, kv_heads, dim, device)
    scales: list[Tensor] = []
    if name != "auto":
        cache, scales = eight_bits(name, cache)
    mine, theirs = ([t.clone() for t in (*cache, *scales)] for _ in range(2))
    given = {"bias": bias, "dtype": torch.float16}
    got = rope_cache(parts, positions, table, slots, *mine, **given)
    want = rope_cache_reference(parts, positions, table, slots, *theirs, **given)
    near(got, want, 2e-3)
    for a, b in zip(mine, theirs, strict=True):
        near(a.float(), b.float(), 1e-2)


@pytest.mark.parametrize("heads, kv_heads, dim", [(28, 4, 128), (4, 2, 64), (3, 1, 24)])
def test_rope_cache(seed: int, device: torch.device, heads: int, kv_heads: int, dim: int) -> None:
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(7, (heads + 2 * kv_heads) * dim, generator=g).half().to(device)
    positions = torch.randint(0, 500, (7,), generator=g).to(device)
    slots = torch.randperm(6 * 16, generator=g)[:7].to(device)
    table = RotaryTable(dim, 1e6, 512).table(device)
    keys, values = random_cache(seed, 6, 16, kv_heads, dim, device)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = rope_cache_reference(qkv.clone(), positions, table, slots, expected_keys, expected_values)
    got = rope_cache(qkv, positions, table, slots, keys, values)
    near(got, expected, 1e-3)
    near(keys, expected_keys, 1e-3)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("heads, kv_heads, dim", [(14, 2, 128), (4, 2, 64), (3, 1, 24)])
def test_rope_cache_writes_eight_bits(
    seed: int, device: torch.device, name: str, heads: int, kv_heads: int, dim: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(7, (heads + 2 * kv_heads) * dim, generator=g)
    qkv[3, -dim:] = 0  # a group of zeros has a scale too
    qkv = qkv.half().to(device)
    positions = torch.randint(0, 500, (7,), generator=g).to(device)
    slots = torch.randperm(6 * 16, generator=g)[:7].to(device)
    table = RotaryTable(dim, 1e6, 512).table(device)
    (keys, values), scales = eight_bits(name, random_cache(seed, 6, 16, kv_heads, dim, device))
    expected = [x.clone() for x in (keys, values, *scales)]
    rotated = rope_cache_reference(qkv.clone(), positions, table, slots, *expected)
    near(rope_cache(qkv, positions, table, slots, keys, values, *scales), rotated, 1e-3)
    for numbers, own, expected_numbers, expected_scales in zip(
        (keys, values), scales, expected[:2], expected[2:], strict=True
    ):
        near(own, expected_scales, 1e-3)
        read = dequantize(numbers, own, torch.float32)
        should = dequantize(expected_numbers, expected_scales, torch.float32)
        if device.type == "cpu" and name != "int8":
            # Triton's interpreter loses the carry of a mantissa that rounds up to a power of two.
            carried = expected_numbers.float().frexp().mantissa.abs() == 0.5
            read, should = read.masked_fill(carried, 0), should.masked_fill(carried, 0)
        # A number on the edge between two may fall to either side.
        step = {"int8": 1 / 127, "fp8_e4m3": 1 / 8, "fp8_e5m2": 1 / 4}[name]
        assert float((read - should).abs().max()) <= 1.01 * step * float(should.abs().max())
        near(read, should, step / 20)


def test_a_token_may_stay_out_of_the_cache(seed: int, device: torch.device) -> None:
    keys, values = random_cache(seed, 2, 16, 1, 32, device)
    before = keys.clone(), values.clone()
    qkv = torch.randn(1, 3 * 32, generator=torch.Generator().manual_seed(seed)).half().to(device)
    none = torch.tensor([-1], device=device)
    rope_cache(
        qkv, torch.tensor([3], device=device), RotaryTable(32, 1e6, 8).table(device), none, keys, values
    )
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
