"""Paints a scene at twice the size, brings it down, then adds grain, blur and JPEG traces."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .backdrops import grain, paint_backdrop, tile
from .example import CLASS_INDEX, COLOUR_INDEX, Mark
from .lettering import paint_sign
from .palette import RGB, darker, ink, lighter, luminance
from .scene import Group, Scene, Thing
from .shapes import SHAPES

LARGE = 700 * 700


def part_colour(role: str, main: RGB, group: Group) -> RGB:
    light = luminance(main) > 150
    if role == "main":
        return main
    if role == "shade":
        return (
            lighter(main, 0.18)
            if group.colour == "black"
            else darker(main, 0.1 if group.colour == "white" else 0.2)
        )
    if role == "tint":
        return lighter(main, 0.35) if group.colour != "black" else (200, 205, 205)
    return {
        "glass": (96, 140, 176) if light else (205, 228, 242),
        "dark": (38, 38, 42) if group.colour != "black" else (70, 70, 78),
        "metal": (196, 196, 200),
        "trunk": (112, 74, 44),
        "stem": (48, 128, 52) if group.colour != "green" else (96, 84, 40),
        "skin": (240, 198, 164),
        "beak": (236, 150, 40) if group.colour != "orange" else (120, 80, 40),
        "eye": (15, 15, 18) if group.colour != "black" else (250, 250, 250),
        "roof": darker(main, 0.42) if group.colour != "black" else (110, 70, 60),
        "heart": (242, 200, 50) if group.colour not in ("yellow", "orange") else (120, 70, 30),
    }[role]


def paint_thing(
    draw: ImageDraw.ImageDraw, group: Group, thing: Thing, scale: int, unit: float
) -> tuple[float, ...]:
    """Draws one thing and returns its box in picture pixels, as fractions of a pixel."""
    look = thing.look
    dice = Random(look.seed)
    main = ink(group.colour, dice)
    shape = SHAPES[group.kind][look.variant]
    angle = math.radians(look.angle)
    cos, sin = math.cos(angle), math.sin(angle)
    points = shape.points
    if look.flip:
        points = points * (-1.0, 1.0)
    turned = points @ np.array([[cos, sin], [-sin, cos]])
    # A turned thing is brought back to the place and size that were kept for it.
    low, high = turned.min(0), turned.max(0)
    turned = (turned - (low + high) / 2) * (thing.size / (high - low).max())
    turned += (thing.x, thing.y)
    box = (*turned.min(0), *turned.max(0))
    at = turned * scale
    line = scale * unit
    black = (25, 25, 28)
    edge = darker(main, 0.6) if dice.random() < 0.4 else black
    if group.colour == "black":
        edge = (120, 120, 126)
    thick = max(1, round(line * dice.uniform(1.1, 1.9)))
    if look.style == "shaded":
        offset = (0.03 * thing.size + unit) * scale
        shadow = np.add(at, offset)
    start = 0
    for role, cut in zip(shape.roles, shape.cuts, strict=True):
        part = at[start:cut]
        corners = [tuple(p) for p in part.tolist()]
        fill = part_colour(role, main, group)
        if look.style == "outline":
            if (
                role in ("main", "shade", "roof", "trunk", "stem", "dark", "skin", "tint")
                and (cut - start) > 2
            ):
                width = max(2, round(line * (2.6 if role in ("main", "shade", "roof") else 1.6)))
                draw.line([*corners, corners[0], corners[1]], fill=main, width=width, joint="curve")
        else:
            if look.style == "shaded" and role in ("main", "roof"):
                draw.polygon([tuple(p) for p in shadow[start:cut].tolist()], fill=darker(fill, 0.45))
            draw.polygon(corners, fill=fill)
            if role in ("main", "shade", "roof", "skin", "trunk"):
                if look.style == "edged":
                    draw.line([*corners, corners[0]], fill=edge, width=thick)
                elif look.style == "sketch":
                    for _ in range(2):
                        loose = [
                            (x + dice.gauss(0, 0.8) * line, y + dice.gauss(0, 0.8) * line) for x, y in corners
                        ]
                        draw.line([*loose, loose[0]], fill=edge, width=max(1, round(line * 0.7)))
        start = cut
    return box


_pixels = True


@contextmanager
def texts_only() -> Iterator[None]:
    """Inside, `paint` gives one black pixel and no marks: for counting words, hundreds of times faster."""
    global _pixels
    _pixels = False
    try:
        yield
    finally:
        _pixels = True


@lru_cache(maxsize=4)
def _backdrop(name: str, width: int, height: int, seed: int, scale: int) -> Image.Image:
    """Frames and changed pictures share it."""
    image = paint_backdrop(name, width, height, Random(seed))
    return image.resize((width * scale, height * scale), Image.Resampling.NEAREST) if scale > 1 else image


def paint(scene: Scene, grit: int | None = None, clean: bool = False) -> tuple[np.ndarray, list[Mark]]:
    """The picture, uint8 [h, w, 3], and its marks; the same scene gives the same picture.

    `grit` seeds the traces of the camera alone, so that frames of one scene differ as frames do;
    `clean` leaves them away.
    """
    if not _pixels:
        return np.zeros((1, 1, 3), np.uint8), []
    scale = 2 if scene.width * scene.height <= LARGE else 1
    canvas = _backdrop(scene.backdrop, scene.width, scene.height, scene.seed, scale).copy()
    draw = ImageDraw.Draw(canvas)
    marks: list[Mark] = []
    for group in scene.groups:
        for thing in group.things:
            x0, y0, x1, y1 = paint_thing(draw, group, thing, scale, scene.unit)
            box = (math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))
            marks.append(Mark(CLASS_INDEX[group.kind], COLOUR_INDEX[group.colour], box))
    for sign in scene.signs:
        marks += paint_sign(canvas, sign, scale)
    if scale > 1:
        canvas = canvas.reduce(scale)
    for mark in marks:
        x0, y0, x1, y1 = mark.box
        mark.box = (max(x0, 0), max(y0, 0), min(x1, scene.width), min(y1, scene.height))
    if clean:
        return np.array(canvas), marks
    return camera(canvas, Random(scene.seed + 1 if grit is None else grit), bool(scene.signs)), marks


def camera(image: Image.Image, dice: Random, text: bool) -> np.ndarray:
    """Grain, a little blur, JPEG: each on some pictures, weaker where there is text to read."""
    if dice.random() < 0.12:
        image = image.filter(ImageFilter.BoxBlur(dice.uniform(0.2, 0.6 if text else 1.0)))
    if dice.random() < 0.15:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=dice.randint(55 if text else 35, 90))
        image = Image.open(data)
    pixels = np.asarray(image.convert("RGB"))
    if dice.random() < 0.4:
        height, width, _ = pixels.shape
        strength = int(dice.uniform(10, 45 if text else 70))
        noise = (tile(grain(), width, height, dice).astype(np.int16) * strength) >> 8
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels)
