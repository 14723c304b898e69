"""Many rows times an int4 matrix on a CPU: dense blocks against torch's own product and a float reference."""

from __future__ import annotations

import pytest
import torch

from huoyan.layers import int4_cpu
from huoyan.layers.int4 import Int4Linear, Int4Weight
from huoyan.planning import pieces

ROWS = pieces.FEW_ROWS_CPU


def random_weight(out: int, width: int, group: int, seed: int) -> Int4Weight:
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (out, width), generator=g, dtype=torch.uint8)
    scales = (torch.rand(out, width // group, generator=g) + 0.5) * width**-0.5
    return Int4Weight(q, scales.bfloat16().float(), torch.randint(0, 16, scales.shape, generator=g).float())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out, width, group", [(64, 32, 32), (320, 256, 64), (448, 384, 128), (48, 128, 128)])
def test_many_rows(
    seed: int, out: int, width: int, group: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(out, width, group, seed)
    g = torch.Generator().manual_seed(seed)
    added = torch.randn(out, generator=g).bfloat16() if bias else None
    layer = Int4Linear(weight, added, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert layer.packing == "cpu"
    x = torch.randn(ROWS + 1, width, generator=g).bfloat16()
    expected = x.float() @ weight.dequantize().T + (0 if added is None else added.float())
    for values in (pieces.UNPACKED_VALUES, 128 * width):
        monkeypatch.setattr(pieces, "UNPACKED_VALUES", values)
        for rows in (ROWS, ROWS + 1):
            got = layer(x[:rows])
            assert got.dtype is torch.bfloat16
            assert (got.float() - expected[:rows]).norm() / expected[:rows].norm() < 2e-2


@pytest.mark.skipif(not int4_cpu.unpacking_pays(), reason="this processor's torch packs in another order")
def test_unpacked_is_the_weight(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(256, 128, 64, seed)
    layer = Int4Linear(weight, None, dtype=torch.bfloat16, device=torch.device("cpu"))
    dense = torch.cat([int4_cpu.unpack(layer.packed, layer.scales, n, n + 128) for n in (0, 128)])
    expected = weight.dequantize()
    # A scale's and an offset's rounding, of values up to 15 scales.
    bound = (weight.scales * 15 * 2**-7).repeat_interleave(64, 1)
    assert ((dense.float() - expected).abs() <= bound).all()
    called = []
    monkeypatch.setattr(int4_cpu, "unpack", lambda *part: called.append(part[2:]) or dense[part[2] : part[3]])
    layer(torch.randn(ROWS, 128).bfloat16())
    assert not called
    layer(torch.randn(ROWS + 1, 128).bfloat16())
    assert called == [(0, 256)]


def test_another_order_is_left_to_torch(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Int4Linear(
        random_weight(128, 64, 32, seed), None, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    x = torch.randn(ROWS + 1, 64).bfloat16()
    order = int4_cpu.pack
    # Where halves stand the other way round, what is packed to see does not come back.
    monkeypatch.setattr(int4_cpu, "pack", lambda q: order(q.flip(0)))
    int4_cpu.unpacking_pays.cache_clear()
    try:
        assert not int4_cpu.unpacking_pays()
        by_one = torch.cat([layer(row) for row in x.split(1)])
        torch.testing.assert_close(layer(x), by_one, rtol=2**-7, atol=1e-2)
    finally:
        int4_cpu.unpacking_pays.cache_clear()
