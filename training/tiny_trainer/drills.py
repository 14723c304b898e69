"""Crowded pictures without questions, for the auxiliary heads alone: many letters and many things at once.

A sign in an ordinary picture holds some five letters. Telling 62 characters in 17 fonts apart takes more
letters than that leaves time to draw; a drill holds twenty times as many, from the training split only.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from huoyan_training.example import Example
from huoyan_training.lettering import choose_word, measure
from huoyan_training.painter import paint
from huoyan_training.scene import (
    Group,
    Scene,
    Thing,
    choose_backdrop,
    choose_colour,
    choose_kind,
    new_look,
)
from huoyan_training.splits import UNSEEN_COUNT
from huoyan_training.words import new_sign

FAMILY = "drill"


def draw_drill(dice: Random) -> Example:
    """A picture of one slice: lines of words, a crowd of things, or one above the other."""
    ratio = 2 ** dice.uniform(-1, 1) if dice.random() < 0.4 else 1.0
    width, height = int(224 * ratio**0.5), int(224 / ratio**0.5)
    scene = Scene(width, height, choose_backdrop(dice), dice.randrange(1 << 30))
    kind = dice.random()
    border = height * (1.0 if kind < 0.55 else 0.0 if kind < 0.8 else dice.uniform(0.3, 0.7))
    _add_words(scene, dice, border)
    _add_things(scene, dice, border)
    picture, marks = paint(scene)
    return Example([picture], "image", [], [], [], marks=[marks])


def _add_words(scene: Scene, dice: Random, bottom: float) -> None:
    top = 2.0
    while True:
        letter = 12.5 * 2.6 ** (dice.random() ** 1.7)
        line = letter * dice.uniform(1.5, 2.2)
        if top + line > bottom:
            return
        left = dice.uniform(2, 30)
        while True:
            sign = new_sign(dice, scene.backdrop, choose_word(dice, "train"))
            sign.board = sign.board and line > letter * 2.1
            sign.height = letter * dice.uniform(0.9, 1.05)
            sign.angle = sign.angle / 2
            sign.width = measure(sign)
            if left + sign.width + 2 > scene.width:
                break
            sign.x, sign.y = left + sign.width / 2, top + line / 2
            scene.signs.append(sign)
            left += sign.width + letter * dice.uniform(0.7, 2.0)
        top += line


def _add_things(scene: Scene, dice: Random, top: float) -> None:
    cell = dice.uniform(36, 90)
    columns, rows = int(scene.width / cell), int((scene.height - top) / cell)
    counts: Counter[str] = Counter()
    for row in range(rows):
        for column in range(columns):
            kind = choose_kind(dice, scene.backdrop if dice.random() < 0.5 else "white")
            colour = choose_colour(dice, kind, scene.backdrop)
            if colour is None or dice.random() < 0.15:
                continue
            size = cell * dice.uniform(0.7, 1.0)
            slack = (cell - size) / 2
            x = (column + 0.5) * scene.width / columns + dice.uniform(-slack, slack)
            y = top + (row + 0.5) * (scene.height - top) / rows + dice.uniform(-slack, slack)
            counts[kind] += 1
            scene.groups.append(
                Group(kind, colour, [Thing(x, y, size, new_look(dice, kind, colour, scene.backdrop))])
            )
    # Numbers of a kind that are kept from training stay out of the drills too.
    for kind, count in counts.items():
        if count == UNSEEN_COUNT[kind]:
            scene.groups.remove(next(g for g in scene.groups if g.kind == kind))
