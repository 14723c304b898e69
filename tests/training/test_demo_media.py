"""The pictures that come with tiny are small, and the script draws them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
MEDIA = ROOT / "src" / "huoyan" / "tiny" / "media"
NAMES = {"airplane.jpg", "street.jpg", "sign.jpg", "stars.jpg", "stars_later.jpg", "poster.jpg", "car.mp4"}


def test_files_are_there_and_small() -> None:
    assert {p.name for p in MEDIA.iterdir()} == NAMES
    assert sum(p.stat().st_size for p in MEDIA.iterdir()) < 200_000
    assert (MEDIA / "car.mp4").stat().st_size < 100_000


def test_script_draws_the_same(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "training" / "make_demo_media.py"), str(tmp_path)],
        check=True,
        capture_output=True,
    )
    for name in NAMES - {"car.mp4"}:
        old, new = (np.asarray(Image.open(folder / name), np.int16) for folder in (MEDIA, tmp_path))
        assert old.shape == new.shape
        assert np.abs(old - new).mean() < 2


def test_clip_shows_a_car_driving_right() -> None:
    av = pytest.importorskip("av")
    with av.open(str(MEDIA / "car.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == 40
    red = [(f[..., 0] > 150) & (f[..., 1] < 90) & (f[..., 2] < 90) for f in frames]
    centres = [np.nonzero(mask)[1].mean() for mask in red]
    assert all(b >= a - 1 for a, b in itertools.pairwise(centres))
    assert centres[-1] - centres[0] > 100
