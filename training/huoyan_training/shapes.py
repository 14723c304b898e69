"""Unit outlines of the things: each variant is a list of polygons with a role, longest side 2, centred on 0.

x grows to the right and y downwards; "main" and "shade" carry the thing's colour, the others are details.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Points = list[tuple[float, float]]
Part = tuple[str, Points]


@dataclass(frozen=True, slots=True)
class Shape:
    """points: [n, 2] of all parts; `cuts` are where a part ends; `tilt` (degrees) and `flips` may vary."""

    roles: tuple[str, ...]
    points: np.ndarray
    cuts: tuple[int, ...]
    tilt: float
    flips: bool


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> Points:
    steps = max(6, int(24 * (stop - start) / 360))
    angles = (math.radians(start + (stop - start) * k / steps) for k in range(steps + (stop - start < 360)))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def spikes(n: int, inner: float, turn: float = -90) -> Points:
    return [
        ((r := 1 if k % 2 == 0 else inner) * math.cos(a := math.radians(turn + 180 * k / n)), r * math.sin(a))
        for k in range(2 * n)
    ]


def airplanes() -> list[list[Part]]:
    fuselage: Points = [
        (-0.96, -0.1), (-0.8, -0.15), (0.62, -0.16), (0.84, -0.1), (0.99, 0.02),
        (0.92, 0.1), (0.7, 0.15), (-0.45, 0.15), (-0.8, 0.05),
    ]  # fmt: skip
    fin: Points = [(-0.97, -0.1), (-1.0, -0.52), (-0.8, -0.52), (-0.5, -0.14)]
    wing: Points = [(0.2, 0.03), (-0.12, 0.03), (-0.5, 0.5), (-0.3, 0.5)]
    tailplane: Points = [(-0.66, -0.04), (-0.84, -0.04), (-1.0, 0.16), (-0.88, 0.16)]
    far_wing: Points = [(0.12, -0.14), (-0.1, -0.14), (-0.28, -0.42), (-0.16, -0.42)]
    windows: list[Part] = [("glass", box(x / 10, -0.08, x / 10 + 0.055, -0.015)) for x in range(-5, 6)]
    cockpit: Part = ("glass", [(0.74, -0.1), (0.84, -0.08), (0.9, -0.02), (0.76, -0.02)])
    airliner: list[Part] = [("shade", far_wing), ("main", fin), ("main", fuselage), ("shade", tailplane)]
    airliner += [*windows, cockpit, ("shade", ellipse(0.02, 0.26, 0.14, 0.065)), ("shade", wing)]
    above: list[Part] = [
        ("shade", [(0.22, -0.06), (-0.04, -0.06), (-0.4, -0.92), (-0.22, -0.92)]),
        ("shade", [(0.22, 0.06), (-0.04, 0.06), (-0.4, 0.92), (-0.22, 0.92)]),
        ("shade", [(-0.72, 0), (-0.84, -0.36), (-0.98, -0.36), (-0.92, 0), (-0.98, 0.36), (-0.84, 0.36)]),
        (
            "main",
            [
                (-1, 0),
                (-0.8, -0.09),
                (0.6, -0.12),
                (0.9, -0.07),
                (1, 0),
                (0.9, 0.07),
                (0.6, 0.12),
                (-0.8, 0.09),
            ],
        ),
        ("glass", [(0.8, -0.07), (0.88, 0), (0.8, 0.07), (0.74, 0)]),
    ]
    small: list[Part] = [
        ("main", [(-1, -0.42), (-0.82, -0.42), (-0.6, -0.16), (-0.95, -0.05)]),
        (
            "main",
            [
                (-0.98, -0.08),
                (-0.4, -0.2),
                (0.5, -0.22),
                (0.85, -0.1),
                (0.92, 0.1),
                (0.6, 0.24),
                (-0.2, 0.22),
            ],
        ),
        ("glass", [(0.05, -0.2), (0.12, -0.4), (0.36, -0.4), (0.5, -0.21)]),
        ("shade", [(-0.35, 0.0), (0.4, 0.0), (0.34, 0.12), (-0.3, 0.12)]),
        ("dark", box(0.93, -0.36, 0.99, 0.36)),
    ]
    return [airliner, airliner, above, small]


def cars() -> list[list[Part]]:
    def wheels(*xs: float, y: float = 0.36, r: float = 0.2) -> list[Part]:
        return [
            part
            for x in xs
            for part in (("dark", ellipse(x, y, r, r)), ("metal", ellipse(x, y, r * 0.45, r * 0.45)))
        ]

    sedan: list[Part] = [
        ("main", [(-0.55, -0.1), (-0.36, -0.5), (0.28, -0.5), (0.55, -0.1)]),
        ("main", [(-1, 0), (-0.92, -0.1), (0.6, -0.12), (0.94, -0.02), (1, 0.12), (1, 0.34), (-1, 0.34)]),
        ("glass", [(-0.42, -0.1), (-0.29, -0.41), (-0.06, -0.41), (-0.06, -0.1)]),
        ("glass", [(0.03, -0.1), (0.03, -0.41), (0.23, -0.41), (0.42, -0.1)]),
        *wheels(-0.55, 0.55),
    ]
    beetle: list[Part] = [
        (
            "main",
            [*ellipse(0, 0.2, 0.72, 0.75, 180, 360), (0.95, 0.12), (1, 0.36), (-1, 0.36), (-0.95, 0.12)],
        ),
        ("glass", [(-0.45, -0.1), (-0.3, -0.4), (-0.05, -0.46), (-0.05, -0.1)]),
        ("glass", [(0.05, -0.1), (0.05, -0.46), (0.3, -0.4), (0.45, -0.1)]),
        *wheels(-0.52, 0.52, y=0.38, r=0.23),
    ]
    wagon: list[Part] = [
        ("main", [(-0.98, -0.5), (0.3, -0.5), (0.56, -0.08), (0.96, 0.0), (1, 0.34), (-1, 0.34)]),
        ("glass", box(-0.86, -0.4, -0.4, -0.1)),
        ("glass", box(-0.3, -0.4, 0.02, -0.1)),
        ("glass", [(0.12, -0.4), (0.25, -0.4), (0.42, -0.1), (0.12, -0.1)]),
        *wheels(-0.6, 0.58),
    ]
    return [sedan, beetle, wagon]


def buses() -> list[list[Part]]:
    def bus(top: float, windows: int, doors: bool) -> list[Part]:
        step = 1.7 / windows
        parts: list[Part] = [("main", [(-1, top), (0.92, top), (1, top + 0.1), (1, 0.42), (-1, 0.42)])]
        parts += [
            ("glass", box(-0.9 + k * step, top + 0.12, -0.9 + (k + 0.78) * step, top + 0.42))
            for k in range(windows)
        ]
        if doors:
            parts.append(("shade", box(0.5, top + 0.5, 0.74, 0.4)))
        for x in (-0.58, 0.3):
            parts += [("dark", ellipse(x, 0.42, 0.16, 0.16)), ("metal", ellipse(x, 0.42, 0.07, 0.07))]
        return parts

    double = bus(-0.75, 5, True)
    double[1:1] = [("glass", box(-0.9 + k * 0.34, -0.16, -0.64 + k * 0.34, 0.08)) for k in range(4)]
    return [bus(-0.5, 5, True), bus(-0.58, 4, False), double]


def boats() -> list[list[Part]]:
    sail: list[Part] = [
        ("trunk", box(-0.05, -0.95, 0.02, 0.4)),
        ("main", [(0.07, -0.9), (0.72, 0.28), (0.07, 0.28)]),
        ("main", [(-0.1, -0.7), (-0.1, 0.28), (-0.62, 0.28)]),
        ("shade", [(-0.95, 0.4), (0.95, 0.4), (0.6, 0.8), (-0.62, 0.8)]),
    ]
    ship: list[Part] = [
        ("metal", box(-0.5, -0.25, 0.4, 0.12)),
        ("glass", box(-0.38, -0.14, -0.2, 0.02)),
        ("glass", box(-0.1, -0.14, 0.08, 0.02)),
        ("shade", box(-0.2, -0.6, 0.08, -0.25)),
        ("main", [(-1, 0.1), (1, 0.06), (0.7, 0.55), (-0.78, 0.55)]),
    ]
    rowing: list[Part] = [
        ("main", [(-1, -0.1), (-0.7, 0.05), (0.7, 0.05), (1, -0.1), (0.66, 0.42), (-0.66, 0.42)]),
        ("shade", [(-0.86, 0.14), (0.86, 0.14), (0.8, 0.24), (-0.8, 0.24)]),
        ("trunk", [(-0.02, 0.08), (0.06, 0.08), (-0.32, -0.62), (-0.4, -0.58)]),
    ]
    return [sail, sail, ship, rowing]


def birds() -> list[list[Part]]:
    flying: list[Part] = [
        ("shade", [(0.1, -0.05), (-0.15, -0.75), (-0.4, -0.6), (-0.3, 0.0)]),
        (
            "main",
            [(-1, 0.08), (-0.92, -0.16), (-0.4, -0.04), (0.4, -0.14), (0.72, 0.0), (0.5, 0.2), (-0.1, 0.28)],
        ),
        ("main", ellipse(0.62, -0.1, 0.2, 0.18)),
        ("beak", [(0.78, -0.16), (1, -0.06), (0.78, 0.0)]),
        ("main", [(0.2, 0.0), (-0.3, 0.02), (-0.55, -0.85), (-0.3, -0.7)]),
        ("eye", ellipse(0.67, -0.14, 0.045, 0.045)),
    ]
    perched: list[Part] = [
        ("beak", [(0.72, -0.55), (1, -0.44), (0.72, -0.36)]),
        ("main", [(-1, 0.3), (-0.3, -0.2), (0.0, 0.3), (-0.5, 0.42)]),
        ("main", ellipse(0.05, 0.1, 0.55, 0.42)),
        ("main", ellipse(0.5, -0.42, 0.3, 0.28)),
        ("shade", [(-0.45, 0.1), (0.1, -0.1), (0.25, 0.2), (-0.1, 0.34)]),
        ("eye", ellipse(0.58, -0.47, 0.06, 0.06)),
        ("dark", box(0.0, 0.5, 0.05, 0.8)),
        ("dark", box(0.2, 0.48, 0.25, 0.8)),
    ]
    return [flying, perched]


def fishes() -> list[list[Part]]:
    def fish(ry: float, tail: float) -> list[Part]:
        return [
            ("shade", [(-0.25, -ry * 0.8), (0.25, -ry * 0.85), (-0.05, -ry - 0.25)]),
            ("shade", [(-0.1, ry * 0.8), (0.25, ry * 0.8), (-0.05, ry + 0.18)]),
            ("main", [(-0.45, 0), (-1, -tail), (-0.86, 0), (-1, tail)]),
            ("main", ellipse(0.2, 0, 0.78, ry)),
            ("tint", ellipse(0.66, -ry * 0.2, 0.12, 0.12)),
            ("eye", ellipse(0.68, -ry * 0.2, 0.06, 0.06)),
            ("shade", [(0.2, -0.04), (-0.05, 0.16), (0.2, 0.16)]),
        ]

    return [fish(0.45, 0.42), fish(0.34, 0.36)]


def cats() -> list[list[Part]]:
    def face(x: float, y: float, r: float) -> list[Part]:
        return [
            ("main", [(x - r * 0.95, y - r * 0.2), (x - r * 0.85, y - r * 1.35), (x - r * 0.2, y - r * 0.8)]),
            ("main", [(x + r * 0.95, y - r * 0.2), (x + r * 0.85, y - r * 1.35), (x + r * 0.2, y - r * 0.8)]),
            ("main", ellipse(x, y, r, r * 0.88)),
            ("tint", ellipse(x - r * 0.4, y - r * 0.12, r * 0.2, r * 0.22)),
            ("tint", ellipse(x + r * 0.4, y - r * 0.12, r * 0.2, r * 0.22)),
            ("eye", ellipse(x - r * 0.4, y - r * 0.12, r * 0.1, r * 0.2)),
            ("eye", ellipse(x + r * 0.4, y - r * 0.12, r * 0.1, r * 0.2)),
            ("beak", [(x - r * 0.13, y + r * 0.2), (x + r * 0.13, y + r * 0.2), (x, y + r * 0.38)]),
        ]

    whiskers: list[Part] = [
        ("dark", [(s * 0.3, 0.35 + d), (s * 1.0, 0.25 + 2 * d), (s * 1.0, 0.29 + 2 * d), (s * 0.3, 0.39 + d)])
        for s in (-1, 1)
        for d in (0, 0.12)
    ]
    sitting: list[Part] = [
        ("shade", [(0.3, 0.9), (0.75, 0.8), (0.85, 0.3), (0.7, 0.25), (0.62, 0.65), (0.3, 0.7)]),
        ("main", ellipse(0, 0.5, 0.46, 0.5)),
        *face(0, -0.3, 0.48),
    ]
    return [[*face(0, 0.1, 0.85), *whiskers], sitting]


def people() -> list[list[Part]]:
    def person(arm: float, skirt: bool) -> list[Part]:
        legs: list[Part] = [
            ("dark", [(-0.2, 0.25), (-0.02, 0.25), (-0.05, 1), (-0.22, 1)]),
            ("dark", [(0.2, 0.25), (0.02, 0.25), (0.05, 1), (0.22, 1)]),
        ]
        body: Points = (
            [(-0.18, -0.52), (0.18, -0.52), (0.42, 0.5), (-0.42, 0.5)]
            if skirt
            else [(-0.26, -0.52), (0.26, -0.52), (0.24, 0.36), (-0.24, 0.36)]
        )
        arms: list[Part] = [
            ("main", [(s * 0.2, -0.5), (s * 0.58, arm), (s * 0.46, arm + 0.08), (s * 0.16, -0.3)])
            for s in (-1, 1)
        ]
        hands: list[Part] = [("skin", ellipse(s * 0.53, arm + 0.05, 0.07, 0.07)) for s in (-1, 1)]
        head: list[Part] = [
            ("skin", ellipse(0, -0.76, 0.21, 0.23)),
            ("dark", ellipse(0, -0.82, 0.22, 0.18, 180, 360)),
        ]
        return [*legs, *hands, *arms, ("main", body), *head]

    return [person(0.05, False), person(-0.75, False), person(0.0, True)]


def houses() -> list[list[Part]]:
    def house(eave: float, wide: float, chimney: bool, windows: int) -> list[Part]:
        parts: list[Part] = [("shade", box(0.4, -0.85, 0.58, -0.2))] if chimney else []
        parts += [
            ("main", box(-wide, eave, wide, 0.8)),
            ("roof", [(-wide - 0.15, eave), (0, -0.9), (wide + 0.15, eave)]),
            ("trunk", box(-0.14, 0.3, 0.14, 0.8)),
        ]
        for k in range(windows):
            x = (-1 if k == 0 else 1) * wide * 0.58
            parts.append(("glass", box(x - 0.14, eave + 0.18, x + 0.14, eave + 0.46)))
        return parts

    return [house(-0.1, 0.75, True, 2), house(-0.2, 0.6, False, 2), house(0.0, 0.85, False, 2)]


def trees() -> list[list[Part]]:
    trunk: Part = ("trunk", box(-0.12, 0.2, 0.12, 1))
    crown: list[Part] = [
        trunk,
        ("main", ellipse(-0.35, -0.15, 0.42, 0.42)),
        ("main", ellipse(0.35, -0.15, 0.42, 0.42)),
        ("main", ellipse(0, -0.5, 0.48, 0.48)),
        ("main", ellipse(0, -0.05, 0.42, 0.36)),
    ]
    fir: list[Part] = [
        ("trunk", box(-0.1, 0.6, 0.1, 1)),
        ("main", [(-0.62, 0.7), (0, 0.0), (0.62, 0.7)]),
        ("main", [(-0.5, 0.2), (0, -0.5), (0.5, 0.2)]),
        ("main", [(-0.38, -0.3), (0, -1), (0.38, -0.3)]),
    ]
    round_tree: list[Part] = [trunk, ("main", ellipse(0, -0.32, 0.62, 0.66))]
    return [crown, fir, round_tree]


def flowers() -> list[list[Part]]:
    def flower(petals: int, reach: float, y: float) -> list[Part]:
        parts: list[Part] = [
            ("stem", box(-0.05, y, 0.05, 1)),
            ("stem", [(0.0, 0.75), (0.35, 0.4), (0.42, 0.62), (0.1, 0.85)]),
        ]
        for k in range(petals):
            a = 2 * math.pi * k / petals - math.pi / 2
            parts.append(
                ("main", ellipse(reach * math.cos(a), y + reach * math.sin(a), reach * 0.66, reach * 0.66))
            )
        return [*parts, ("heart", ellipse(0, y, reach * 0.5, reach * 0.5))]

    tulip: list[Part] = [
        ("stem", box(-0.05, -0.2, 0.05, 1)),
        ("stem", [(0.0, 0.9), (-0.45, 0.3), (-0.3, 0.75)]),
        (
            "main",
            [
                (-0.42, -0.9),
                (-0.2, -0.6),
                (0, -1),
                (0.2, -0.6),
                (0.42, -0.9),
                (0.4, -0.3),
                (0, -0.05),
                (-0.4, -0.3),
            ],
        ),
    ]
    return [flower(5, 0.4, -0.4), flower(6, 0.38, -0.4), flower(8, 0.42, -0.35), tulip]


def suns() -> list[list[Part]]:
    def rays(n: int, width: float) -> list[Part]:
        parts: list[Part] = []
        for k in range(n):
            a = 2 * math.pi * k / n
            c, s = math.cos(a), math.sin(a)
            parts.append(
                (
                    "main",
                    [
                        (0.66 * c - width * s, 0.66 * s + width * c),
                        (c, s),
                        (0.66 * c + width * s, 0.66 * s - width * c),
                    ],
                )
            )
        return parts

    return [
        [*rays(8, 0.13), ("main", ellipse(0, 0, 0.55, 0.55))],
        [*rays(12, 0.09), ("main", ellipse(0, 0, 0.56, 0.56))],
        [("main", spikes(12, 0.68)), ("tint", ellipse(0, 0, 0.5, 0.5))],
    ]


def moons() -> list[list[Part]]:
    def crescent(x: float, r: float) -> list[Part]:
        top = math.degrees(math.acos((x * x + 1 - r * r) / (2 * x)))
        outer = ellipse(0, 0, 1, 1, top, 360 - top)
        ex, ey = outer[0]
        inner_angle = math.degrees(math.atan2(ey, ex - x))
        return [("main", outer + ellipse(x, 0, r, r, inner_angle, 360 - inner_angle)[::-1])]

    return [crescent(0.5, 0.85), crescent(0.65, 0.9)]


def stars() -> list[list[Part]]:
    return [[("main", spikes(5, 0.42))], [("main", spikes(5, 0.5))], [("main", spikes(5, 0.38))]]


def hearts() -> list[list[Part]]:
    def heart(depth: float) -> list[Part]:
        curve = [
            (
                16 * math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - depth * math.cos(4 * t)),
            )
            for t in (2 * math.pi * k / 36 for k in range(36))
        ]
        return [("main", curve)]

    return [heart(1.0), heart(0.4)]


def build(parts: list[Part], tilt: float, flips: bool) -> Shape:
    points = np.array([p for _, part in parts for p in part], np.float64)
    low, high = points.min(0), points.max(0)
    points = (points - (low + high) / 2) * (2 / (high - low).max())
    cuts = tuple(int(c) for c in np.cumsum([len(part) for _, part in parts]))
    return Shape(tuple(role for role, _ in parts), points, cuts, tilt, flips)


def _library() -> dict[str, tuple[Shape, ...]]:
    drawn: dict[str, tuple[list[list[Part]], float, bool]] = {
        "airplane": (airplanes(), 18, True),
        "car": (cars(), 6, True),
        "bus": (buses(), 5, True),
        "boat": (boats(), 8, True),
        "bird": (birds(), 12, True),
        "fish": (fishes(), 20, True),
        "cat": (cats(), 10, True),
        "person": (people(), 6, True),
        "house": (houses(), 4, True),
        "tree": (trees(), 5, True),
        "flower": (flowers(), 15, True),
        "sun": (suns(), 40, False),
        "moon": (moons(), 35, True),
        "star": (stars(), 30, False),
        "heart": (hearts(), 18, False),
        "circle": ([[("main", ellipse(0, 0, 1, 1))], [("main", ellipse(0, 0, 1, 0.94))]], 10, False),
        "square": ([[("main", box(-1, -1, 1, 1))]], 14, False),
        "triangle": (
            [[("main", [(-1, 0.8), (0, -0.9), (1, 0.8)])], [("main", [(-1, 0.8), (0.4, -0.8), (1, 0.8)])]],
            180,
            True,
        ),
    }
    return {
        name: tuple(build(v, tilt, flips) for v in variants)
        for name, (variants, tilt, flips) in drawn.items()
    }


SHAPES: dict[str, tuple[Shape, ...]] = _library()
