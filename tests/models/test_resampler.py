"""The resampler: positions of patches, strips that have more than is kept, and slices some at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from huoyan.models.resampler import GridPositions, sincos_positions
from huoyan.planning.pieces import KEPT_POSITIONS
from tests.plan.shapes import random_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_follow_their_formula_however_long_a_slice_is(seed: int, dtype: torch.dtype) -> None:
    width = 64
    rng = np.random.default_rng(seed)
    longest = int(rng.integers(2 * KEPT_POSITIONS, 5 * KEPT_POSITIONS))
    grids = [(2, longest), (3, 5), (longest, 1), (KEPT_POSITIONS, KEPT_POSITIONS + 1)]
    got = GridPositions(width)(grids, CPU, dtype)
    w = 10000.0 ** (-np.arange(width // 4) / (width / 4))

    def axis(count: int) -> np.ndarray:
        angles = np.outer(np.arange(count), w)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    parts = []
    for rows, columns in grids:
        whole = np.zeros((rows, columns, width))
        whole[..., : width // 2] = axis(columns)
        whole[..., width // 2 :] = axis(rows)[:, None]
        parts.append(whole.reshape(-1, width))
    want = torch.from_numpy(np.concatenate(parts)).float().to(dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0.005 if dtype is torch.bfloat16 else 1e-6)


def test_what_a_strip_needed_is_not_kept() -> None:
    positions = GridPositions(64)
    positions([(1, 9 * KEPT_POSITIONS)], CPU, torch.float32)
    kept = sum(table.untyped_storage().nbytes() for table in positions._kept.values())
    assert kept == KEPT_POSITIONS * 32 * 4
    # The axis from any place on is a part of the axis from the beginning.
    assert torch.equal(sincos_positions(7, 32, 100), sincos_positions(107, 32)[100:])


def test_slices_are_resampled_some_at_a_time_and_it_makes_no_difference(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    model = random_model(rng, torch.float32)
    resampler = model.resampler
    grids = [(rng.randint(1, 6), rng.randint(1, 9)) for _ in range(rng.randint(4, 9))]
    patches = sum(rows * columns for rows, columns in grids)
    x = torch.randn(patches, model.config.vision.hidden_size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        whole = resampler(x, grids)
        monkeypatch.setattr("huoyan.models.resampler.RESAMPLED_PATCHES", max(patches // 3, 1))
        some = resampler(x, grids)
    torch.testing.assert_close(some, whole, rtol=1e-5, atol=1e-5)
