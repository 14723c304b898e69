"""What a picture holds before it is painted: a backdrop, groups of things and their places, a sign."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from random import Random

from .example import KINDS
from .language import PLAIN
from .shapes import SHAPES
from .splits import UNSEEN_COLOUR, UNSEEN_COUNT, Signature, belongs_to_heldout, unseen_pair

OBJECT_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white")
NATURAL = {
    "airplane": ("white", "white", "red", "blue"), "car": ("red", "blue", "white", "black", "yellow"),
    "bus": ("yellow", "red", "green", "blue"), "boat": ("white", "red", "blue"), "bird": ("black", "blue",
    "red", "white"),
    "fish": ("orange", "red", "blue"), "cat": ("black", "white", "orange"), "person": ("red", "blue",
    "green"),
    "house": ("red", "white", "yellow"), "tree": ("green",), "flower": ("red", "pink", "yellow", "purple"),
    "sun": ("yellow", "yellow", "orange", "red"), "moon": ("yellow", "white"), "star": ("yellow",),
    "heart": ("red", "pink"), "circle": ("red", "blue"), "square": ("blue", "green"), "triangle": ("green",
    "yellow"),
}  # fmt: skip

SKY_KINDS = ("airplane", "bird", "sun", "moon", "star")
GROUND_KINDS = ("car", "bus", "cat", "person", "house", "tree", "flower")
SEA_KINDS = ("boat", "fish")
FREE_KINDS = ("heart", "circle", "square", "triangle")
OPEN_SKY = ("sky", "cloudy", "night")
WITH_HORIZON = ("grass", "sea", "street", "beach", "snow", "mountain")
HIDDEN = {
    "sky": ("blue",), "cloudy": ("white", "blue"), "night": ("black",), "grass": ("green",), "sea": ("blue",),
    "street": ("black",), "beach": ("yellow",), "snow": ("white",), "mountain": ("green", "blue"),
    "white": ("white",),
    "black": ("black",), "gray": (), "yellow": ("yellow",), "pink": ("pink", "white"),
}  # fmt: skip
# Lines of this colour are too faint on this backdrop; filled shapes are not.
THIN = {
    ("orange", "yellow"),
    ("white", "yellow"),
    ("yellow", "white"),
    ("pink", "white"),
    ("white", "snow"),
    ("white", "sky"),
    ("yellow", "snow"),
    ("pink", "snow"),
    ("blue", "sky"),
    ("red", "pink"),
    ("yellow", "pink"),
    ("blue", "black"),
}
CELLS = ("left", "middle", "right"), ("top", "middle", "bottom")


@dataclass(slots=True)
class Look:
    variant: int
    style: str
    seed: int
    flip: bool
    angle: float


@dataclass(slots=True)
class Thing:
    """Centre and longest side in picture pixels."""

    x: float
    y: float
    size: float
    look: Look


@dataclass(slots=True)
class Group:
    kind: str
    colour: str
    things: list[Thing]
    place: str | None = None

    @property
    def count(self) -> int:
        return len(self.things)


@dataclass(slots=True)
class Sign:
    """A short text: centre, height of a capital letter in pixels, on a board or straight on the backdrop."""

    text: str
    x: float
    y: float
    height: float
    board: bool
    seed: int
    font: int
    angle: float
    ink: str
    width: float = 0.0


@dataclass(slots=True)
class Scene:
    """`unit` is one pixel of the 224 x 224 pixel area that a small picture is resized to."""

    width: int
    height: int
    backdrop: str
    seed: int
    groups: list[Group] = field(default_factory=list)
    signs: list[Sign] = field(default_factory=list)

    @property
    def unit(self) -> float:
        return math.sqrt(self.width * self.height) / 224

    def signature(self) -> Signature:
        return (self.backdrop, *sorted((g.kind, g.colour, g.count, g.place or "") for g in self.groups))

    def of_kind(self, kind: str) -> list[Group]:
        return [g for g in self.groups if g.kind == kind]

    def total(self, kind: str | None = None, colour: str | None = None) -> int:
        return sum(
            g.count
            for g in self.groups
            if (kind is None or g.kind == kind) and (colour is None or g.colour == colour)
        )

    def has_unseen(self) -> bool:
        return any(unseen_pair(g.kind, g.colour, g.count) for g in self.groups) or any(
            self.total(g.kind) == UNSEEN_COUNT[g.kind] for g in self.groups
        )

    def copy(self) -> Scene:
        groups = [replace(g, things=[replace(t) for t in g.things]) for g in self.groups]
        return replace(self, groups=groups, signs=[replace(s) for s in self.signs])


def cell_of(x: float, y: float, margin: float = 0.03) -> str | None:
    """The ninth of the picture that a point (in fractions) lies in; None within `margin` of a border."""
    names = []
    for value, cells in zip((x, y), CELLS, strict=True):
        if min(abs(value - 1 / 3), abs(value - 2 / 3)) < margin:
            return None
        names.append(cells[int(min(value, 0.999) * 3)])
    column, row = names
    if row == "middle":
        return column
    return row if column == "middle" else f"{row} {column}"


def side_of(points: list[tuple[float, float]]) -> str | None:
    """The side that a whole group keeps to, "" where it clearly keeps to none, None where unclear."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    sides = [
        name
        for name, inside in (
            ("left", max(xs) < 0.37), ("right", min(xs) > 0.63), ("top", max(ys) < 0.37), ("bottom",
            min(ys) > 0.63),
        )
        if inside
    ]  # fmt: skip
    if len(sides) == 1:
        return sides[0]
    spread = max(xs) > 0.52 and min(xs) < 0.48 and max(ys) > 0.52 and min(ys) < 0.48
    return "" if spread and not sides else None


def picture_size(dice: Random, large: bool | None = None) -> tuple[int, int]:
    """Width and height: mostly within one slice (224 x 224 pixels of area), some larger, 1:4 to 4:1."""
    ratio = 2 ** (dice.gauss(0.1, 0.45) if dice.random() < 0.75 else dice.uniform(-2, 2))
    ratio = min(max(ratio, 0.25), 4.0)
    if large is None:
        large = dice.random() < 0.08
    area = (
        dice.uniform(300, 640) ** 2
        if large
        else 224**2 * (1.0 if dice.random() < 0.4 else dice.uniform(0.5, 1.0))
    )
    width, height = int((area * ratio) ** 0.5), int((area / ratio) ** 0.5)
    return (width, height) if large else (max(width, 100), max(height, 100))


def choose_backdrop(dice: Random) -> str:
    if dice.random() < 0.45:
        return dice.choice((*PLAIN, "white"))
    return dice.choice(("sky", "sky", "cloudy", "night", *WITH_HORIZON))


def choose_kind(dice: Random, backdrop: str) -> str:
    """Mostly what belongs before the backdrop."""
    if backdrop in PLAIN or dice.random() < 0.3:
        return dice.choice(KINDS)
    if backdrop in OPEN_SKY:
        return dice.choice((*SKY_KINDS, "airplane", "bird"))
    if backdrop == "sea":
        return dice.choice((*SEA_KINDS, *SEA_KINDS, "sun", "bird", "airplane"))
    return dice.choice((*GROUND_KINDS, *GROUND_KINDS, "sun", "bird", "airplane"))


def visible(kind: str, colour: str, backdrop: str) -> bool:
    return colour not in HIDDEN[backdrop] or (kind == "tree" and colour == "green" and backdrop != "mountain")


def choose_colour(dice: Random, kind: str, backdrop: str, unseen: bool = False) -> str | None:
    """A colour that shows on the backdrop; only with `unseen` the one kept from training."""
    if unseen:
        colour = UNSEEN_COLOUR[kind]
        return colour if visible(kind, colour, backdrop) else None
    for _ in range(20):
        colour = dice.choice(NATURAL[kind] if dice.random() < 0.35 else OBJECT_COLOURS)
        if colour != UNSEEN_COLOUR[kind] and visible(kind, colour, backdrop):
            return colour
    return None


def choose_count(dice: Random, kind: str, most: int = 5, many: bool = False) -> int:
    weights = (20, 21, 20, 20, 19) if many else (56, 14, 11, 10, 9)
    while True:
        count = dice.choices((1, 2, 3, 4, 5), weights)[0]
        if count <= most and count != UNSEEN_COUNT[kind]:
            return count


def new_look(dice: Random, kind: str, colour: str, backdrop: str) -> Look:
    shapes = SHAPES[kind]
    variant = dice.randrange(len(shapes))
    styles, weights = ("filled", "edged", "shaded", "sketch", "outline"), (34, 28, 14, 14, 10)
    style = dice.choices(styles, weights)[0]
    if style == "outline" and (backdrop not in (*PLAIN, "sky", "snow") or (colour, backdrop) in THIN):
        style = "filled"
    shape = shapes[variant]
    tilt = shape.tilt * (1 if dice.random() < 0.6 else 0.2)
    return Look(
        variant,
        style,
        dice.randrange(1 << 30),
        shape.flips and dice.random() < 0.5,
        dice.uniform(-tilt, tilt),
    )


def size_range(total: int) -> tuple[float, float]:
    """Longest sides in units, by how many things share the picture."""
    return (
        (34, 170)
        if total == 1
        else (34, 105)
        if total == 2
        else (33, 76)
        if total <= 4
        else (31, 58)
        if total <= 6
        else (30, 46)
    )


class NoRoom(Exception):
    """The draw did not fit; draw again."""


def rows_for(kind: str, scene: Scene) -> tuple[str, ...]:
    if scene.backdrop not in WITH_HORIZON or kind in FREE_KINDS:
        return CELLS[1]
    return ("top",) if kind in SKY_KINDS else ("middle", "bottom")


Spot = tuple[float, float, float]  # centre and side of a square that is taken


def sign_spots(sign: Sign) -> list[Spot]:
    """The squares that cover a sign, in a row."""
    side, reach = 2.4 * sign.height, sign.width / 2 + 0.6 * sign.height
    n = max(1, math.ceil(2 * reach / side))
    return [(sign.x - reach + (k + 0.5) * 2 * reach / n, sign.y, side) for k in range(n)]


def arrange(
    scene: Scene, wanted: list[tuple[str, str, int]], dice: Random, taken: list[Spot] | None = None
) -> None:
    """Puts (kind, colour, count) groups where nothing touches and every place has one name. Raises NoRoom."""
    unit, width, height = scene.unit, scene.width, scene.height
    total = sum(count for _, _, count in wanted)
    low, high = size_range(total)
    high = max(low, min(high, 0.8 * min(width, height) / unit))
    taken = [*(taken or []), *(spot for sign in scene.signs for spot in sign_spots(sign))]
    wide, tall = width > 2.2 * height, height > 2.2 * width
    names: set[str] = set()
    order = sorted(range(len(wanted)), key=lambda k: -wanted[k][2])
    placed: dict[int, Group] = {}
    for index in order:
        kind, colour, count = wanted[index]
        same = dice.random() < 0.7
        base = dice.uniform(low, high)
        look = new_look(dice, kind, colour, scene.backdrop)
        rows = rows_for(kind, scene)
        side = ""
        if count > 1 and count < 5 and dice.random() < 0.4:
            sides = (["left", "right"] if not tall else []) + (
                [r for r in rows if r != "middle"] if not wide else []
            )
            side = dice.choice(sides) if sides else ""
        for _ in range(12):
            things: list[Thing] = []
            spots = list(taken)
            for _ in range(count):
                one = look if same else new_look(dice, kind, colour, scene.backdrop)
                one = replace(one, seed=look.seed, style=look.style)
                spot = _find_spot(scene, dice, spots, base, low, count, side, rows, wide, tall)
                if spot is None:
                    break
                x, y, size = spot
                spots.append((x, y, size))
                things.append(Thing(x, y, size, replace(one, angle=one.angle + dice.uniform(-3, 3))))
            if len(things) == count:
                points = [(t.x / width, t.y / height) for t in things]
                found = cell_of(*points[0]) if count == 1 else side_of(points)
                if found is not None and (count > 1 or found not in names) and (found == side or count == 1):
                    taken = spots
                    names.add(found)
                    placed[index] = Group(kind, colour, things, found or None)
                    break
            base = max(low, base * 0.88)
        else:
            raise NoRoom
    scene.groups = [placed[k] for k in range(len(wanted))]


def _find_spot(
    scene: Scene, dice: Random, spots: list[Spot], base: float, low: float, count: int,
    side: str, rows: tuple[str, ...], wide: bool, tall: bool,
) -> Spot | None:  # fmt: skip
    unit, width, height = scene.unit, scene.width, scene.height
    for _ in range(14):
        size = max(low, base * dice.uniform(0.85, 1.1)) * unit
        half = size / 2 + unit
        if 2 * half > min(width, height):
            return None
        x0, x1, y0, y1 = half, width - half, half, height - half
        if count == 1:
            column, row = dice.randrange(3), CELLS[1].index(dice.choice(rows))
            if wide:
                row = 1
            if tall:
                column = 1
            x0, x1 = max(x0, (column / 3 + 0.03) * width), min(x1, ((column + 1) / 3 - 0.03) * width)
            y0, y1 = max(y0, (row / 3 + 0.03) * height), min(y1, ((row + 1) / 3 - 0.03) * height)
        else:
            if side == "left":
                x1 = min(x1, 0.36 * width)
            elif side == "right":
                x0 = max(x0, 0.64 * width)
            elif side == "top":
                y1 = min(y1, 0.36 * height)
            elif side == "bottom":
                y0 = max(y0, 0.64 * height)
        if x1 < x0 or y1 < y0:
            base = max(low, base * 0.9)
            continue
        x, y = dice.uniform(x0, x1), dice.uniform(y0, y1)
        if all(max(abs(x - a), abs(y - b)) > (size + s) / 2 + 4 * unit for a, b, s in spots):
            return x, y, size
    return None


USUAL, CROWDED = (34, 34, 23, 9), (20, 34, 30, 16)
"""How often a picture has one to four groups: mostly, and where there is more to learn from each."""


def choose_groups(
    scene: Scene,
    dice: Random,
    split: str,
    most: int = 4,
    many: bool = False,
    shares: tuple[int, ...] = USUAL,
) -> list[tuple[str, str, int]]:
    """What to show: (kind, colour, count) per group, at most 8 things, by the rules of the split."""
    wanted: list[tuple[str, str, int]] = []
    n = min(most, dice.choices((1, 2, 3, 4), shares)[0])
    totals: dict[str, int] = {}
    for k in range(n):
        kind = choose_kind(dice, scene.backdrop)
        if wanted and dice.random() < 0.15:
            kind = wanted[0][0]
        strange = split == "unseen" and k == 0
        strange_colour = strange and dice.random() < 0.5
        colour = choose_colour(dice, kind, scene.backdrop, strange_colour)
        if colour is None:
            continue
        count = UNSEEN_COUNT[kind] if strange and not strange_colour else choose_count(dice, kind, many=many)
        if (kind, colour) in [(a, b) for a, b, _ in wanted] or sum(totals.values()) + count > 8:
            continue
        total = totals.get(kind, 0) + count
        if totals.get(kind) and (total == UNSEEN_COUNT[kind] or total > 5):
            continue
        totals[kind] = total
        wanted.append((kind, colour, count))
    if not wanted or (split == "unseen" and not unseen_pair(*wanted[0])):
        raise NoRoom
    return wanted


def right_split(scene: Scene, split: str) -> bool:
    """Whether the scene may be used in the split (signs are judged by their words elsewhere)."""
    if split == "unseen":
        return scene.has_unseen()
    return not scene.has_unseen() and belongs_to_heldout(scene.signature()) == (split == "heldout")


def draw_scene(
    dice: Random, split: str, most: int = 4, size: tuple[int, int] | None = None, many: bool = False
) -> Scene:
    """A scene of things for the split, drawn again until everything fits and belongs to the split.

    With `many`, every count from 1 to 5 is as likely; otherwise most groups are one thing.
    """
    shares = CROWDED if split == "train" else USUAL
    while True:
        width, height = size or picture_size(dice)
        scene = Scene(width, height, choose_backdrop(dice), dice.randrange(1 << 30))
        try:
            arrange(scene, choose_groups(scene, dice, split, most, many, shares), dice)
        except NoRoom:
            continue
        if right_split(scene, split):
            return scene
