"""Slices as vLLM's model reads them, against the description of the published layout written plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from huoyan.backends.vllm.pictures import slice_patches
from huoyan.media.types import SliceRules


def test_patches_stand_side_by_side(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rules = SliceRules(
        patch_size=int(rng.choice([2, 14])), norm_mean=(0.5, 0.4, 0.3), norm_std=(0.5, 0.25, 0.2)
    )
    side = rules.patch_size
    grids = [(int(rng.integers(1, 6)), int(rng.integers(1, 6))) for _ in range(3)]
    slices = [rng.integers(0, 256, (r * side, c * side, 3), dtype=np.uint8) for r, c in grids]
    found, found_grids = slice_patches(slices, rules, torch.float32)
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
