"""Prefill over the blocks of the KV cache, against plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from huoyan.kernels.paged_prefill import paged_prefill, paged_prefill_reference, prefill_tiles
from tests.kernels.test_decode_kernels import EIGHT_BITS, eight_bits, near, random_cache


def chunks(g: torch.Generator, count: int, longest: int, most_past: int) -> tuple[np.ndarray, np.ndarray]:
    """`cu_seqlens_q` and `seq_lens` of chunks with and without a past."""
    lengths = torch.randint(1, longest + 1, (count,), generator=g).numpy()
    past = torch.randint(0, most_past + 1, (count,), generator=g).numpy()
    past[0] = 0
    return np.concatenate([[0], np.cumsum(lengths)]), lengths + past


def random_tables(g: torch.Generator, rows: int, blocks: int, device: torch.device) -> Tensor:
    return torch.stack([torch.randperm(blocks, generator=g) for _ in range(rows)]).int().to(device)


def apart(got: Tensor, expected: Tensor, bounds: np.ndarray, first: int) -> None:
    """Each chunk by itself: a short one must not hide beside a long one."""
    for i in range(first, len(bounds) - 1):
        near(got[bounds[i] : bounds[i + 1]], expected[bounds[i] : bounds[i + 1]], 3e-3)


@pytest.mark.parametrize("heads, kv_heads, dim", [(14, 2, 128), (4, 2, 64), (3, 3, 72)])
@pytest.mark.parametrize("queries, keys", [(32, 16), (64, 32), (32, 64)])
def test_paged_prefill(
    seed: int, device: torch.device, heads: int, kv_heads: int, dim: int, queries: int, keys: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    bounds, lengths = chunks(g, 4, 90, 150)
    cache = random_cache(seed, 24, 16, kv_heads, dim, device)
    tables = random_tables(g, 4, 24, device)
    q = torch.randn(int(bounds[-1]), heads, dim, generator=g).half().to(device)
    tiles = torch.from_numpy(prefill_tiles(bounds, lengths, 0, queries)).to(device)
    got = paged_prefill(q, *cache, tables, tiles, queries=queries, tile_keys=keys)
    apart(got, paged_prefill_reference(q, *cache, tables, tiles), bounds, 0)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_paged_prefill_of_eight_bits(seed: int, device: torch.device, name: str) -> None:
    g = torch.Generator().manual_seed(seed)
    bounds, lengths = chunks(g, 3, 70, 100)
    numbers, scales = eight_bits(name, random_cache(seed, 16, 16, 2, 64, device))
    tables = random_tables(g, 3, 16, device)
    q = torch.randn(int(bounds[-1]), 4, 64, generator=g).half().to(device)
    tiles = torch.from_numpy(prefill_tiles(bounds, lengths, 0, 64)).to(device)
    got = paged_prefill(q, *numbers, tables, tiles, *scales, queries=64)
    apart(got, paged_prefill_reference(q, *numbers, tables, tiles, *scales), bounds, 0)


def test_rows_of_no_tile_stay_as_they_are(seed: int, device: torch.device) -> None:
    g = torch.Generator().manual_seed(seed)
    # A decode, two chunks, and rows that only fill up; tiles of no rows among the others.
    bounds, lengths = np.array([0, 1, 41, 61]), np.array([30, 50, 20])
    cache = random_cache(seed, 8, 16, 2, 64, device)
    tables = random_tables(g, 3, 8, device)
    wide = torch.randn(70, 8 * 64, generator=g).half().to(device)
    q = wide[:, : 4 * 64].unflatten(1, (4, 64))
    tiles = np.zeros((7, 4), np.int32)
    own = prefill_tiles(bounds, lengths, 1, 32)
    tiles[: len(own)] = own
    before = torch.randn(q.shape, generator=g).half().to(device)
    out = before.clone()
    on_device = torch.from_numpy(tiles).to(device)
    assert paged_prefill(q, *cache, tables, on_device, out=out, queries=32) is out
    apart(out, paged_prefill_reference(q, *cache, tables, on_device), bounds, 1)
    assert torch.equal(out[0], before[0])
    assert torch.equal(out[61:], before[61:])


def test_tiles_cover_each_row_once(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    bounds, lengths = chunks(g, 9, 400, 1000)
    tiles = prefill_tiles(bounds, lengths, 2, 128)
    assert tiles.dtype == np.int32
    covered = np.zeros(int(bounds[-1]), int)
    for chunk, first, rows, position in tiles.tolist():
        assert 1 <= rows <= 128
        assert bounds[chunk] <= first
        assert first + rows <= bounds[chunk + 1]
        assert position == lengths[chunk] - (bounds[chunk + 1] - first)
        covered[first : first + rows] += 1
    assert (covered[: bounds[2]] == 0).all()
    assert (covered[bounds[2] :] == 1).all()
    assert (np.diff(tiles[:, 3]) <= 0).all()
    assert prefill_tiles(bounds, lengths, 9, 128).shape == (0, 4)
