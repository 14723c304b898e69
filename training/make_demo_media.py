"""Draws the pictures and the clip that come with `tiny`.

Run `PYTHONPATH=training python training/make_demo_media.py [FOLDER]`.

They are composed by hand, with the painter of the training pictures: no training seed draws them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from huoyan_training.lettering import measure
from huoyan_training.painter import paint
from huoyan_training.scene import Group, Look, Scene, Sign, Thing

FOLDER = Path(__file__).parents[1] / "src" / "huoyan" / "tiny" / "media"
WIDTH, HEIGHT = 272, 184


def thing(
    x: float,
    y: float,
    size: float,
    variant: int = 0,
    style: str = "filled",
    flip: bool = False,
    angle: float = 0.0,
) -> Thing:
    """x and y in fractions of the picture, size in pixels."""
    return Thing(x * WIDTH, y * HEIGHT, size, Look(variant, style, 20260, flip, angle))


def airplane() -> Scene:
    return Scene(WIDTH, HEIGHT, "sky", 11, [Group("airplane", "white", [thing(0.52, 0.5, 150, angle=-8)])])


def street() -> Scene:
    return Scene(
        WIDTH, HEIGHT, "street", 24,
        [
            Group("house", "yellow", [thing(0.2, 0.47, 72)]),
            Group("sun", "orange", [thing(0.86, 0.16, 44)]),
            Group("car", "red", [thing(0.8, 0.75, 66, style="edged")]),
        ],
    )  # fmt: skip


def sign() -> Scene:
    board = Sign("STOP", WIDTH / 2, HEIGHT * 0.42, 34, True, 5, 1, 0.0, "white")
    board.width = measure(board)
    return Scene(WIDTH, HEIGHT, "grass", 31, signs=[board])


def stars() -> Scene:
    return Scene(
        WIDTH, HEIGHT, "night", 44,
        [
            Group("moon", "yellow", [thing(0.16, 0.24, 58, variant=1)]),
            Group("star", "yellow", [thing(0.4, 0.5, 36), thing(0.64, 0.24, 34), thing(0.85, 0.55, 38),
            thing(0.6, 0.8, 36)]),
        ],
    )  # fmt: skip


def stars_later() -> Scene:
    later = stars()
    later.groups.append(Group("bird", "blue", [thing(0.17, 0.78, 52)]))
    return later


def poster() -> Scene:
    """Its print is legible in a slice only."""
    scene = Scene(960, 640, "grass", 57)
    tree = Look(0, "filled", 3, False, 0.0)
    scene.groups = [Group("tree", "green", [Thing(270, 330, 330, tree)])]
    small = Sign("CAFE", 790, 520, 30, True, 5, 0, 0.0, "black")
    small.width = measure(small)
    scene.signs = [small]
    return scene


def clip(path: Path, seconds: float = 5.0, fps: int = 8) -> None:
    """A red car that drives to the right, H.264."""
    import av

    scene = Scene(WIDTH, HEIGHT, "street", 62, [Group("car", "red", [thing(0.2, 0.62, 78, style="edged")])])
    frames = int(seconds * fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "24", "preset": "slow"}
        for k in range(frames):
            car = scene.groups[0].things[0]
            scene.groups[0].things[0] = replace(car, x=WIDTH * (0.2 + 0.6 * k / (frames - 1)))
            pixels, _ = paint(scene, clean=True)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")))
        container.mux(stream.encode(None))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for make in (airplane, street, sign, stars, stars_later, poster):
        pixels, _ = paint(make(), clean=True)
        Image.fromarray(pixels).save(folder / f"{make.__name__}.jpg", quality=92, optimize=True)
    clip(folder / "car.mp4")
    for path in sorted(folder.iterdir()):
        print(f"{path.name:18s} {path.stat().st_size / 1000:7.1f} kB")


if __name__ == "__main__":
    main()
