"""Slices as vLLM's model reads them, against the description of the published layout written plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from huoyan.media.types import SliceRules
from huoyan.models.patches import cut_patches, normalise
from huoyan.models.published_patches import published_patches


def test_patches_stand_side_by_side(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rules = SliceRules(
        patch_size=int(rng.choice([2, 14])), norm_mean=(0.5, 0.4, 0.3), norm_std=(0.5, 0.25, 0.2)
    )
    side = rules.patch_size
    grids = [(int(rng.integers(1, 6)), int(rng.integers(1, 6))) for _ in range(3)]
    slices = [rng.integers(0, 256, (r * side, c * side, 3), dtype=np.uint8) for r, c in grids]
    found, found_grids = published_patches(slices, rules, torch.float32)
    assert found_grids == grids
    for pixels, (rows, columns), patches in zip(slices, grids, found, strict=True):
        assert patches.shape == (3, side, side * rows * columns)
        for row in range(rows):
            for column in range(columns):
                tile = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side] / 255.0
                values = (tile - np.array(rules.norm_mean)) / np.array(rules.norm_std)
                at = (row * columns + column) * side
                assert patches[:, :, at : at + side].numpy() == pytest.approx(
                    values.transpose(2, 0, 1), abs=1e-5
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_they_are_the_encoder_s_own_patches_in_another_order(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    rules = SliceRules()
    slices = [
        rng.integers(0, 256, (14 * int(rng.integers(1, 5)), 14 * int(rng.integers(1, 5)), 3), dtype=np.uint8)
        for _ in range(4)
    ]
    found, grids = published_patches(slices, rules, dtype)
    cut, cut_grids = cut_patches(slices, 14)
    assert grids == cut_grids
    own = normalise(torch.from_numpy(cut), rules.norm_mean, rules.norm_std, dtype)
    back = torch.cat([part.unflatten(2, (-1, 14)).permute(2, 0, 1, 3).flatten(1) for part in found])
    assert torch.equal(back, own)
