"""Pictures with something to read: a sign on an ordinary picture, small print on a large one."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from random import Random

import numpy as np

from .language import LANGUAGES, place, some, vary
from .lettering import FONT_FILES, INKS, choose_word, hard_word, measure
from .painter import paint
from .questions import Made, Turn, ask, ask_several, quoted
from .scene import (
    Group,
    NoRoom,
    Scene,
    Sign,
    Thing,
    arrange,
    choose_backdrop,
    choose_colour,
    choose_groups,
    choose_kind,
    new_look,
    picture_size,
)  # fmt: skip

# Inks that can be read anywhere on a backdrop; on the others print needs a board.
READABLE = {
    "white": ("black", "red", "blue", "green", "purple"), "black": ("white", "yellow", "orange"),
    "gray": ("black",),
    "yellow": ("black", "blue", "red", "purple"), "pink": ("black", "blue", "purple", "green"),
    "sky": ("black", "red"),
    "cloudy": ("black", "red"), "night": ("white", "yellow", "orange"), "grass": ("black",),
    "beach": ("black",),
    "snow": ("black", "red"),
}  # fmt: skip


def new_sign(dice: Random, backdrop: str, text: str) -> Sign:
    board = dice.random() < 0.55 or backdrop not in READABLE
    ink = dice.choice(INKS if board else READABLE[backdrop])
    font = dice.randrange(len(FONT_FILES))
    angle = dice.uniform(-8, 8) if not board and dice.random() < 0.3 else 0.0
    return Sign(text, 0, 0, 10, board, dice.randrange(1 << 30), font, angle, ink)


def fit_sign(sign: Sign, scene: Scene, dice: Random, low: float, small: float = 1.4) -> None:
    """Gives the sign a height of `low` pixels or more, the nearer to that the greater `small` is, and a place inside
    the picture. Raises NoRoom."""
    across = measure(replace(sign, height=100)) / 100
    extra = 1.3 if sign.board else 0.4
    most = min(
        0.94 * scene.width / (across + extra),
        0.9 * scene.height / (2.4 if sign.board else 1.7),
        70 * scene.unit,
    )
    if most < low:
        raise NoRoom
    sign.height = low * (most / low) ** (dice.random() ** small)
    sign.width = measure(sign)
    half_w, half_h = sign.width / 2 + extra / 2 * sign.height, (1.2 if sign.board else 0.85) * sign.height
    if sign.angle:
        half_h += 0.07 * sign.width
    if 2 * half_w > scene.width or 2 * half_h > scene.height:
        raise NoRoom
    sign.x = dice.uniform(half_w, scene.width - half_w)
    sign.y = dice.uniform(half_h, scene.height - half_h)


def several_signs(dice: Random) -> Made:
    """For training: two to four small signs one below the other, each asked for by its place."""
    while True:
        width, height = picture_size(dice, False)
        scene = Scene(width, height, choose_backdrop(dice), dice.randrange(1 << 30))
        heights = dice.choice((("top", "bottom"), ("top", "middle", "bottom"), ("top", "middle", "bottom")))
        wide = width > 1.5 * height and dice.random() < 0.5
        cells = [(row, side) for row in heights for side in (("left", "right") if wide else ("",))]
        scene.signs = []
        try:
            for row, side in cells:
                band = replace(
                    scene, width=scene.width // (2 if side else 1), height=scene.height // len(heights)
                )
                word = hard_word(dice) if dice.random() < 0.6 else choose_word(dice, "train")
                sign = new_sign(dice, scene.backdrop, word)
                fit_sign(sign, band, dice, 13.5 * scene.unit, 2.0)
                sign.x += band.width * (side == "right")
                sign.y += band.height * heights.index(row)
                scene.signs.append(sign)
        except NoRoom:
            continue
        if len({sign.text for sign in scene.signs}) == len(cells):
            break
    turns: list[Turn] = []
    for (row, side), sign in zip(cells, scene.signs, strict=True):
        name = "left" if row == "middle" and side == "left" else "right" if row == "middle" and side else ""
        name = name or f"{row} {side}".strip()
        languages = LANGUAGES if len(cells) < 4 else (dice.choice(LANGUAGES),)
        for lang in languages:
            where = place(name, lang)
            asked = (
                (f"{where}写着什么？", f"{where}的文字是什么？")
                if lang == "zh"
                else (f"What is written {where}?", f"What does it say {where}?")
            )
            turns.append(("word", lang, vary(dice.choice(asked), lang, dice), quoted(sign.text, lang)))
    picture, marks = paint(scene)
    return Made([picture], turns, [marks], unseen=False)


def word_example(dice: Random, split: str) -> Made:
    lesson = split == "train"
    if lesson and dice.random() < 0.3:
        return several_signs(dice)
    # Small print and narrow letters are read last: they are taught more often than they are asked.
    hard = lesson and dice.random() < 0.5
    while True:
        width, height = picture_size(dice, dice.random() < 0.06)
        scene = Scene(width, height, choose_backdrop(dice), dice.randrange(1 << 30))
        sign = new_sign(dice, scene.backdrop, hard_word(dice) if hard else choose_word(dice, split))
        try:
            fit_sign(sign, scene, dice, 13.5 * scene.unit, 3.0 if hard else 1.4)
            scene.signs = [sign]
            if dice.random() < 0.3:
                groups = [g for g in choose_groups(scene, dice, "train", 2) if g[2] == 1]
                arrange(scene, groups, dice)
        except NoRoom:
            continue
        if not scene.has_unseen():
            break
    turns = [t for t in (ask("word", scene, dice), ask("word", scene, dice)) if t]
    if turns[0][2] == turns[-1][2]:
        turns = turns[:1]
    tasks = {
        "describe": 1.0,
        "what": 0.5,
        **({"colour": 1.0, "where": 1.0, "count": 1.0, "exists": 1.0} if scene.groups else {}),
    }
    turns += ask_several(scene, tasks, dice, (2 if scene.groups else 1) + 2 * (split == "train"))
    picture, marks = paint(scene)
    return Made([picture], turns, [marks], unseen=split == "unseen")


@lru_cache(maxsize=4096)
def slice_grid(width: int, height: int, scale: int = 224, most: int = 9) -> tuple[int, int]:
    """Columns and rows that MiniCPM-V's preprocessor cuts a picture of this size into; (1, 1) for no cut."""
    multiple = min(-(-width * height // scale**2), most)
    if multiple <= 1:
        return 1, 1
    ratio = np.log(width / height)
    grids = [
        (n // rows, rows)
        for n in (multiple - 1, multiple, multiple + 1)
        if 1 < n <= most
        for rows in range(n, 0, -1)
        if n % rows == 0
    ]
    return min(grids, key=lambda grid: abs(ratio - np.log(grid[0] / grid[1])))


SMALL_ZH = ("图中的小东西是什么？", "图里很小的东西是什么？", "最小的东西是什么？")
SMALL_EN = (
    "What is the small thing in the picture?",
    "What is the smallest thing?",
    "What is the tiny thing?",
)


def slice_example(dice: Random, split: str) -> Made:
    """A large picture whose print (or one tiny thing) is too small in the overview and clear in one slice."""
    while True:
        long = 448 * 3 ** (dice.random() ** 2)
        ratio = 2 ** dice.uniform(-1.1, 1.1)
        width, height = (int(long), int(long / ratio)) if ratio > 1 else (int(long * ratio), int(long))
        columns, rows = slice_grid(width, height)
        if columns * rows < 3:
            continue
        scene = Scene(width, height, choose_backdrop(dice), dice.randrange(1 << 30))
        cell_w, cell_h = width / columns, height / rows
        # One pixel of a slice, in pixels of the picture; the overview is about sqrt(slices) coarser.
        step = (cell_w * cell_h) ** 0.5 / 224
        column, row = dice.randrange(columns), dice.randrange(rows)
        try:
            if dice.random() < 0.7:
                sign = new_sign(dice, scene.backdrop, choose_word(dice, split))
                # Too small for the overview: at most 7 pixels there.
                most = min(19.0, 7 * scene.unit / step)
                if most < 13.5:
                    continue
                sign.height = dice.uniform(13.5, most) * step
                sign.width = measure(sign)
                half_w, half_h = (
                    sign.width / 2 + 0.7 * sign.height,
                    1.25 * sign.height + 0.07 * sign.width * bool(sign.angle),
                )
                if half_w > 0.47 * cell_w or half_h > 0.47 * cell_h:
                    continue
                sign.x = column * cell_w + dice.uniform(half_w + 0.02 * cell_w, cell_w * 0.98 - half_w)
                sign.y = row * cell_h + dice.uniform(half_h + 0.02 * cell_h, cell_h * 0.98 - half_h)
                scene.signs = [sign]
                if dice.random() < 0.6:
                    arrange(scene, [g for g in choose_groups(scene, dice, "train", 2) if g[2] < 4], dice)
                if scene.has_unseen():
                    continue
                turns = [
                    (lambda t: ("slice", *t[1:]))(t)
                    for t in (ask("word", scene, dice), ask("word", scene, dice))
                    if t
                ]
                if turns[0][2] == turns[-1][2]:
                    turns = turns[:1]
                if scene.groups:
                    turns += ask_several(
                        scene, {"colour": 1.0, "where": 1.0, "count": 1.0, "exists": 1.0}, dice, 1
                    )
            else:
                small = _small_thing(
                    scene, dice, split, (column * cell_w, row * cell_h, cell_w, cell_h), step
                )
                others = [
                    g for g in choose_groups(scene, dice, "train", 2) if g[0] != small.kind and g[2] == 1
                ]
                arrange(scene, others, dice, [(small.things[0].x, small.things[0].y, small.things[0].size)])
                if scene.has_unseen():
                    continue
                turns = _ask_small(small, dice)
                scene.groups.append(small)
        except NoRoom:
            continue
        picture, marks = paint(scene)
        return Made([picture], turns, [marks], unseen=split == "unseen")


def _small_thing(
    scene: Scene, dice: Random, split: str, cell: tuple[float, float, float, float], step: float
) -> Group:
    kind = choose_kind(dice, scene.backdrop)
    colour = choose_colour(dice, kind, scene.backdrop, split == "unseen")
    if colour is None:
        raise NoRoom
    x, y, w, h = cell
    size = dice.uniform(30, 42) * step
    if 1.2 * size > min(w, h):
        raise NoRoom
    half = 0.55 * size + 0.01 * w
    look = replace(new_look(dice, kind, colour, scene.backdrop), style=dice.choice(("filled", "shaded")))
    thing = Thing(x + dice.uniform(half, w - half), y + dice.uniform(half, h - half), size, look)
    return Group(kind, colour, [thing])


def _ask_small(small: Group, dice: Random) -> list[Turn]:
    turns: list[Turn] = []
    for lang in LANGUAGES:
        what = some(small.kind, small.colour, 1, lang)
        if lang == "zh":
            turns.append(("slice", lang, vary(dice.choice(SMALL_ZH), lang, dice), f"小东西是{what}。"))
        else:
            turns.append(
                ("slice", lang, vary(dice.choice(SMALL_EN), lang, dice), f"The small thing is {what}.")
            )
    return turns
