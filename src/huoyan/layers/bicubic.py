"""Pillow's bicubic resize on any device, in plain integer operations: the reference of the CUDA kernels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from huoyan.layers.packed_attention import to_device
from huoyan.media.bicubic import PRECISION_BITS, BicubicTable, bicubic_table, height_first

_MOST_PRODUCTS = 1 << 24
"""Products held at once, 64 MiB."""


def resize_bicubic(pixels: Tensor, width: int, height: int) -> Tensor:
    """uint8 [..., h, w, channels] -> uint8 [..., height, width, channels], the bytes of Pillow's `resize`."""
    sides = {-3: height, -2: width}
    order = (-3, -2) if height_first((pixels.shape[-2], pixels.shape[-3]), (width, height)) else (-2, -3)
    for side in order:
        pixels = _resample(pixels, bicubic_table(pixels.shape[side], sides[side]), side)
    return pixels


def table_on_device(table: BicubicTable, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 first [out] and weights [taps, out], sent in one copy."""
    together = to_device(torch.from_numpy(np.concatenate((table.first[None], table.weights))), device)
    return together[0], together[1:]


@lru_cache(maxsize=1)
def agrees_with_pillow() -> bool:
    """Whether the installed Pillow resizes as this does, by a few small pictures; some milliseconds, once.

    A later Pillow may change its order of the sides again, and a compiler may fuse its products.
    """
    noise = np.random.default_rng(0)
    for width, height, *size in _PROBES:
        rgb = noise.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)
        pillow = Image.fromarray(rgb).resize((size[0], size[1]), Image.Resampling.BICUBIC)
        if not np.array_equal(resize_bicubic(torch.from_numpy(rgb), *size).numpy(), np.asarray(pillow)):
            return False
    return True


# Both orders on both sides of every border between them; growing, shrinking, strips. From (w, h) to (w, h).
_PROBES = (
    (60, 60, 48, 36), (60, 60, 48, 35), (60, 60, 30, 1), (40, 60, 40, 20), (30, 50, 45, 49), (30, 50, 45, 51),
    (2, 200, 14, 199), (2, 201, 14, 150), (1, 300, 14, 70), (300, 1, 70, 14), (120, 47, 42, 98), (97, 133, 28, 42),
    (150, 20, 14, 140), (64, 100, 28, 14), (45, 45, 90, 90),
)  # fmt: skip


def _resample(pixels: Tensor, table: BicubicTable, side: int) -> Tensor:
    """One pass along `side`, counted from the end."""
    first, weights = table_on_device(table, pixels.device)
    last = pixels.shape[side] - 1
    taps, size = weights.shape
    after = -side - 1
    trailing = (1,) * after
    total: Tensor | None = None
    step = max(1, _MOST_PRODUCTS // max(1, pixels.numel() // (last + 1) * size))
    for k in range(0, taps, step):
        some = weights[k : k + step]
        # [taps, out] of input pixels; those beyond the end have no weight.
        at = (first + torch.arange(k, k + len(some), device=first.device).unsqueeze(1)).clamp(max=last)
        rows = pixels.index_select(pixels.dim() + side, at.flatten()).int()
        rows = rows.unflatten(side, (len(some), size)).mul_(some.view(len(some), size, *trailing))
        part = rows.sum(side - 1, dtype=torch.int32)
        total = part if total is None else total.add_(part)
    assert total is not None
    rounded: Tensor = total.add_(1 << (PRECISION_BITS - 1)).bitwise_right_shift_(PRECISION_BITS)
    return rounded.clamp_(0, 255).to(torch.uint8)
