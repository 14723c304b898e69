"""Backdrops painted at picture size: skies, grounds with a horizon, plain papers with gradient or texture."""

from __future__ import annotations

import math
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from .language import PLAIN
from .palette import RGB, darker, lighter, mix, paper

TILE = 1408
HORIZON = {
    "grass": (0.3, 0.4),
    "sea": (0.3, 0.4),
    "street": (0.3, 0.4),
    "beach": (0.3, 0.4),
    "snow": (0.3, 0.4),
}


@lru_cache(maxsize=1)
def grain() -> np.ndarray:
    """Fine noise, int8 [TILE, TILE, 3], in -127..127, cut at random offsets instead of drawn anew."""
    rng = np.random.default_rng(1)
    return np.clip(rng.normal(0, 40, (TILE, TILE, 3)), -127, 127).astype(np.int8)


@lru_cache(maxsize=1)
def blotches() -> np.ndarray:
    """Soft noise, int8 [TILE, TILE, 1]: paper, grass, waves."""
    rng = np.random.default_rng(2)
    total = np.zeros((TILE, TILE), np.float32)
    for step, weight in ((64, 60), (16, 35), (5, 20)):
        n = TILE // step + 1
        coarse = Image.fromarray(rng.integers(0, 256, (n, n), np.uint8))
        total += (np.asarray(coarse.resize((TILE, TILE), Image.Resampling.BICUBIC), np.float32) - 127) * (
            weight / 127
        )
    return np.clip(total, -127, 127).astype(np.int8)[..., None]


def tile(source: np.ndarray, width: int, height: int, dice: Random) -> np.ndarray:
    x, y = dice.randrange(TILE - width + 1), dice.randrange(TILE - height + 1)
    return source[y : y + height, x : x + width]


def ramp(width: int, height: int, top: RGB, bottom: RGB) -> Image.Image:
    steps = np.linspace(0, 1, max(height, 1))[:, None]
    column = np.array(top) * (1 - steps) + np.array(bottom) * steps
    return Image.fromarray(np.repeat(column[:, None].astype(np.uint8), width, axis=1))


def soften(image: Image.Image, strength: float, dice: Random) -> Image.Image:
    """Adds soft noise of about `strength` levels."""
    pixels = np.asarray(image, np.int16)
    noise = (tile(blotches(), image.width, image.height, dice).astype(np.int16) * int(strength * 4)) >> 8
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _sky(width: int, height: int, dice: Random) -> Image.Image:
    top = (dice.randint(70, 130), dice.randint(155, 195), dice.randint(228, 250))
    return ramp(width, height, top, lighter(top, dice.uniform(0.15, 0.65)))


def _cloud(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, shade: int) -> None:
    fill = (shade, shade, min(255, shade + 4))
    for dx, dy, k in (
        (-1.1, 0.1, 0.6),
        (-0.4, -0.25, 0.8),
        (0.45, -0.15, 0.75),
        (1.1, 0.12, 0.55),
        (0, 0.2, 0.7),
    ):
        draw.ellipse(
            (x + (dx - k) * r, y + (dy - k * 0.6) * r, x + (dx + k) * r, y + (dy + k * 0.6) * r), fill=fill
        )


def _cloudy(width: int, height: int, dice: Random) -> Image.Image:
    low = dice.randint(168, 205)
    image = ramp(width, height, (low, low + 8, low + 16), (low + 25, low + 28, low + 32))
    draw = ImageDraw.Draw(image)
    for _ in range(dice.randint(4, 8)):
        r = dice.uniform(0.08, 0.2) * math.sqrt(width * height)
        _cloud(draw, dice.uniform(0, width), dice.uniform(0, height), r, dice.randint(low + 20, 246))
    return image


def _night(width: int, height: int, dice: Random) -> Image.Image:
    top = (dice.randint(2, 18), dice.randint(6, 24), dice.randint(35, 62))
    image = ramp(width, height, top, lighter(top, dice.uniform(0.02, 0.18)))
    draw = ImageDraw.Draw(image)
    specks = [(dice.randrange(width), dice.randrange(height)) for _ in range(dice.randint(20, 70))]
    draw.point(specks, fill=(dice.randint(120, 210),) * 3)
    return image


def _ground(name: str, width: int, height: int, dice: Random) -> Image.Image:
    if name == "mountain":
        image = _sky(width, height, dice)
        draw = ImageDraw.Draw(image)
        for level, rgb in ((0.2, (150, 140, 150)), (0.42, (122, 112, 112))):
            rgb = mix(rgb, (dice.randint(90, 170), 120, 110), 0.25)
            n = dice.randint(2, 4)
            ridge: list[tuple[float, float]] = [(0.0, float(height))]
            for k in range(n + 1):
                ridge.append(
                    ((k - dice.uniform(0.1, 0.3)) / n * width, (level + dice.uniform(0.2, 0.3)) * height)
                )
                ridge.append(
                    ((k + dice.uniform(0.3, 0.6)) / n * width, (level + dice.uniform(-0.08, 0.06)) * height)
                )
            draw.polygon([*ridge, (width, height)], fill=rgb)
            if level < 0.3:
                for x, y in ridge[2::2]:
                    s = 0.07 * height
                    draw.polygon(
                        [(x, y), (x - s * 1.0, y + s * 1.2), (x, y + s * 0.8), (x + s, y + s * 1.2)],
                        fill=(245, 246, 250),
                    )
        return image
    # Sand alone could be yellow paper.
    whole = name != "beach" and dice.random() < 0.2
    edge = 0 if whole else int(height * dice.uniform(*HORIZON[name]))
    near: RGB = {
        "grass": (dice.randint(110, 165), dice.randint(188, 215), dice.randint(70, 105)),
        "sea": (dice.randint(15, 50), dice.randint(90, 125), dice.randint(160, 195)),
        "street": (dice.randint(92, 122),) * 3,
        "beach": (dice.randint(228, 242), dice.randint(205, 217), dice.randint(155, 175)),
        "snow": (dice.randint(232, 246), dice.randint(238, 248), 252),
    }[name]
    image = Image.new("RGB", (width, height))
    if edge:
        image.paste(_sky(width, edge, dice), (0, 0))
    # Snow needs another hue above it to be told from white paper.
    elif name == "snow":
        edge = int(height * 0.3)
        image.paste(_sky(width, edge, dice), (0, 0))
    image.paste(
        ramp(width, height - edge, mix(near, lighter(near, 0.3), 0.6), darker(near, dice.uniform(0, 0.1))),
        (0, edge),
    )
    draw = ImageDraw.Draw(image)
    unit = math.sqrt(width * height) / 224
    if name == "grass":
        blade = darker(near, 0.22)
        for _ in range(dice.randint(30, 60)):
            x, y = dice.uniform(0, width), dice.uniform(edge + 2, height)
            draw.line((x, y, x + dice.uniform(-2, 2) * unit, y - dice.uniform(2, 5) * unit), fill=blade)
    elif name == "sea":
        for _ in range(dice.randint(14, 28)):
            x, y, r = dice.uniform(0, width), dice.uniform(edge + 3, height), dice.uniform(3, 8) * unit
            draw.arc(
                (x - r, y - r / 3, x + r, y + r / 3),
                180,
                360,
                fill=lighter(near, 0.45),
                width=max(1, round(unit)),
            )
    elif name == "street":
        y = edge + (height - edge) * dice.uniform(0.5, 0.7)
        dash, gap = dice.uniform(14, 24) * unit, dice.uniform(8, 16) * unit
        x = -dice.uniform(0, dash)
        while x < width:
            draw.rectangle((x, y, x + dash, y + 2.5 * unit), fill=(238, 238, 232))
            x += dash + gap
        if edge:
            draw.rectangle((0, edge - 3 * unit, width, edge + unit), fill=(170, 168, 162))
    elif name == "beach":
        shore = edge + (height - edge) * 0.16
        draw.rectangle((0, edge, width, shore), fill=(70, 160, 205))
        draw.rectangle((0, shore, width, shore + 2 * unit), fill=(246, 248, 248))
    elif name == "snow":
        for _ in range(dice.randint(8, 20)):
            x, y, r = dice.uniform(0, width), dice.uniform(0, edge), dice.uniform(0.8, 1.6) * unit
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(252, 253, 255))
    return image


def _plain(name: str, width: int, height: int, dice: Random) -> Image.Image:
    base = paper(name, dice)
    kind = dice.random()
    if kind < 0.45 or (name == "white" and kind < 0.7):
        return Image.new("RGB", (width, height), base)
    other = (
        darker(base, dice.uniform(0.02, 0.1)) if name != "black" else lighter(base, dice.uniform(0.03, 0.12))
    )
    if kind < 0.75:
        return ramp(width, height, *((base, other) if dice.random() < 0.5 else (other, base)))
    return soften(Image.new("RGB", (width, height), mix(base, other, 0.5)), dice.uniform(4, 11), dice)


def paint_backdrop(name: str, width: int, height: int, dice: Random) -> Image.Image:
    """An RGB picture of the named backdrop (a key of language.BACKDROPS)."""
    if name in PLAIN:
        return _plain(name, width, height, dice)
    if name == "sky":
        image = _sky(width, height, dice)
    elif name == "cloudy":
        image = _cloudy(width, height, dice)
    elif name == "night":
        return _night(width, height, dice)
    else:
        image = _ground(name, width, height, dice)
    return soften(image, dice.uniform(3, 8), dice) if dice.random() < 0.25 else image
