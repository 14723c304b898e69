"""Pillow's bicubic resize by tables and integer sums: byte for byte, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from huoyan.layers.bicubic import agrees_with_pillow, resize_bicubic
from huoyan.media import bicubic
from huoyan.media.bicubic import bicubic_table, height_first


def side(rng: np.random.Generator) -> int:
    return int(
        rng.choice([1, int(rng.integers(1, 20)), int(rng.integers(1, 200)), int(rng.integers(1, 500))])
    )


def picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Noise, hard edges (which the kernel overshoots), or one grey."""
    kind = rng.integers(0, 3)
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == 1:
        return rng.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)
    return np.full((height, width, 3), rng.integers(0, 256), np.uint8)


def test_the_bytes_are_pillow_s(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        width, height, new_width, new_height = (side(rng) for _ in range(4))
        if rng.random() < 0.1:
            new_width = width
        if rng.random() < 0.1:
            new_height = height
        rgb = picture(rng, width, height)
        expected = np.asarray(Image.fromarray(rgb).resize((new_width, new_height), Image.Resampling.BICUBIC))
        got = resize_bicubic(torch.from_numpy(rgb), new_width, new_height).numpy()
        np.testing.assert_array_equal(got, expected, f"{width}x{height} to {new_width}x{new_height}")


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (3, 9000), (4000, 60)])
def test_strips(seed: int, size: tuple[int, int]) -> None:
    rgb = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    for new in ((14, 14), (14, 2016), (2016, 14), (70, 28)):
        expected = np.asarray(Image.fromarray(rgb).resize(new, Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(resize_bicubic(torch.from_numpy(rgb), *new).numpy(), expected)


def test_several_pictures_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rgb = torch.from_numpy(rng.integers(0, 256, (2, 3, 31, 17, 3), np.uint8))
    got = resize_bicubic(rgb, 28, 14)
    for i in range(2):
        for j in range(3):
            assert torch.equal(got[i, j], resize_bicubic(rgb[i, j], 28, 14))


def test_a_table_s_weights_add_up_to_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        size_in, size_out = int(rng.integers(1, 3000)), int(rng.integers(1, 3000))
        table = bicubic_table(size_in, size_out)
        assert table.first.shape == (size_out,)
        # Each of the weights is rounded by half a unit at most.
        assert (np.abs(table.weights.sum(0) - (1 << 22)) <= table.taps / 2).all()
        assert not table.weights.flags.writeable


def test_the_order_of_the_sides_is_that_of_the_version() -> None:
    tall, strip = ((60, 60), (48, 35)), ((1, 300), (14, 70))
    assert [height_first(*tall, v) for v in ("11.3.0", "12.2.0", "13.0.0")] == [False, False, True]
    assert [height_first(*strip, v) for v in ("10.4.0", "12.1.1", "12.2.0", "13.0.0")] == [
        False,
        False,
        True,
        True,
    ]
    assert not height_first((60, 60), (48, 36), "13.0.0")
    assert not height_first((1, 300), (14, 301), "13.0.0")


def test_a_pillow_that_resizes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agrees_with_pillow()
    try:
        for wrong in (lambda *_: True, lambda *_: False):
            agrees_with_pillow.cache_clear()
            monkeypatch.setattr("huoyan.layers.bicubic.height_first", wrong)
            # Either order alone is that of some version, but never of both kinds of picture from 12.2 on.
            expected = wrong() is False and tuple(map(int, bicubic.PILLOW_VERSION.split(".")[:2])) < (12, 2)
            assert agrees_with_pillow() is expected
    finally:
        monkeypatch.undo()
        agrees_with_pillow.cache_clear()
