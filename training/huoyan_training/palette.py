"""Colours as drawn: each name covers a range, and the ranges stay apart."""

from __future__ import annotations

from colorsys import hsv_to_rgb
from random import Random

RGB = tuple[int, int, int]

# hue in degrees, saturation, value
RANGES = {
    "red": ((-8, 7), (0.78, 1.0), (0.68, 1.0)),
    "orange": ((22, 33), (0.82, 1.0), (0.9, 1.0)),
    "yellow": ((48, 59), (0.72, 1.0), (0.9, 1.0)),
    "green": ((95, 148), (0.6, 1.0), (0.38, 0.72)),
    "blue": ((212, 236), (0.75, 1.0), (0.6, 0.98)),
    "purple": ((268, 288), (0.6, 0.95), (0.5, 0.82)),
    "pink": ((325, 346), (0.3, 0.52), (0.95, 1.0)),
    "black": ((0, 360), (0.0, 0.15), (0.0, 0.15)),
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
    "gray": ((0, 360), (0.0, 0.06), (0.45, 0.66)),
}
# Backdrops are paler than things of the same name.
PLAIN_RANGES = {
    "white": ((0, 360), (0.0, 0.02), (0.97, 1.0)),
    "black": ((0, 360), (0.0, 0.2), (0.0, 0.12)),
    "gray": ((0, 360), (0.0, 0.05), (0.5, 0.72)),
    "yellow": ((49, 56), (0.32, 0.62), (0.95, 1.0)),
    "pink": ((335, 350), (0.14, 0.28), (0.97, 1.0)),
}


def _pick(ranges: tuple[tuple[float, float], ...], dice: Random) -> RGB:
    hue, saturation, value = (dice.uniform(*r) for r in ranges)
    r, g, b = hsv_to_rgb((hue % 360) / 360, saturation, value)
    return int(r * 255), int(g * 255), int(b * 255)


def ink(colour: str, dice: Random) -> RGB:
    return _pick(RANGES[colour], dice)


def paper(colour: str, dice: Random) -> RGB:
    return _pick(PLAIN_RANGES[colour], dice)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """`share` of b, the rest of a."""
    return (
        int(a[0] + (b[0] - a[0]) * share),
        int(a[1] + (b[1] - a[1]) * share),
        int(a[2] + (b[2] - a[2]) * share),
    )


def darker(rgb: RGB, share: float) -> RGB:
    return mix(rgb, (0, 0, 0), share)


def lighter(rgb: RGB, share: float) -> RGB:
    return mix(rgb, (255, 255, 255), share)


def luminance(rgb: RGB) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
