"""A handful of video frames: one thing moves straight, or nothing does."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random

from .description import description
from .language import DIRECTIONS, LANGUAGES, capital, on_backdrop, some, the, vary
from .painter import paint
from .questions import Made, Turn
from .scene import (
    Group,
    NoRoom,
    Scene,
    Spot,
    Thing,
    arrange,
    choose_backdrop,
    choose_colour,
    choose_groups,
    choose_kind,
    new_look,
    picture_size,
)  # fmt: skip
from .splits import belongs_to_heldout

Said = tuple[list[str], str]
VIDEO_ZH = [
    "请描述这个视频。",
    "视频里发生了什么？",
    "描述一下这段视频。",
    "这个视频的内容是什么？",
    "视频里有什么？",
]
VIDEO_EN = [
    "Please describe this video.", "Describe the video.", "What happens in the video?",
    "What is this video about?",
    "What do you see in the video?",
]  # fmt: skip
MOVES_ZH = [
    "什么东西在移动？往哪里移动？",
    "什么在动？",
    "视频里什么在移动？",
    "什么东西在动，向哪个方向？",
    "视频中有什么在移动？",
]
MOVES_EN = [
    "What moves and where to?", "What is moving?", "What moves in the video?",
    "Which thing moves, and in which direction?",
    "What is moving in the video?",
]  # fmt: skip
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def moving(scene: Scene, group: Group | None, direction: str, lang: str, dice: Random) -> list[Said]:
    """What can be asked when `group` moves in `direction`; with None, nothing moves."""
    zh = lang == "zh"
    if group is None:
        still = "没有东西在移动。" if zh else "Nothing moves."
        whole = description(scene, lang) + ("" if zh else " ") + still
        g = dice.choice(scene.groups)
        colour = None if len(scene.of_kind(g.kind)) == 1 else g.colour
        name = the(g.kind, colour, g.count, lang)
        one = (
            [f"{name}在移动吗？", f"{name}动了吗？"]
            if zh
            else [f"{'Does' if g.count == 1 else 'Do'} {name} move?"]
        )
        no = f"没有，{name}没有动。" if zh else f"No, {name} {'does' if g.count == 1 else 'do'} not move."
        return [(VIDEO_ZH if zh else VIDEO_EN, whole), (MOVES_ZH if zh else MOVES_EN, still), (one, no)]
    way = DIRECTIONS[direction][zh]
    full = the(group.kind, group.colour, 1, lang)
    name = the(group.kind, None if len(scene.of_kind(group.kind)) == 1 else group.colour, 1, lang)
    what = some(group.kind, group.colour, 1, lang)
    there = on_backdrop(scene.backdrop, lang)
    asked = direction if dice.random() < 0.5 else dice.choice([d for d in DIRECTIONS if d != direction])
    if zh:
        return [
            (VIDEO_ZH, f"{what}在{there}{way}移动。"),
            (MOVES_ZH, f"{full}{way}移动。"),
            (
                [
                    f"{name}往哪里移动？",
                    f"{name}向哪个方向移动？",
                    f"{name}去哪边了？",
                    f"{name}朝哪个方向动？",
                ],
                f"{name}{way}移动。",
            ),
            (
                [f"{name}在{DIRECTIONS[asked][1]}移动吗？"],
                f"{'是的' if asked == direction else '不是'}，{name}{way}移动。",
            ),
        ]
    yes = "Yes" if asked == direction else "No"
    return [
        (VIDEO_EN, f"{capital(what)} moves {way} {there}."),
        (MOVES_EN, f"{capital(full)} moves {way}."),
        (
            [
                f"Where does {name} move?",
                f"Which way does {name} move?",
                f"In which direction does {name} move?",
                f"Where does {name} go?",
            ],
            f"{capital(name)} moves {way}.",
        ),
        ([f"Does {name} move {DIRECTIONS[asked][0]}?"], f"{yes}, {name} moves {way}."),
    ]


def draw_motion(dice: Random, split: str) -> tuple[Scene, Group | None, str, list[tuple[float, float]]]:
    """The scene with the mover as its first group, the mover, its direction and its centre frame by frame."""
    while True:
        width, height = picture_size(dice, False)
        scene = Scene(width, height, choose_backdrop(dice), dice.randrange(1 << 30))
        unit, frames = scene.unit, dice.choice((2, 3, 3, 4, 4, 5, 5, 6, 7, 8))
        kind = choose_kind(dice, scene.backdrop)
        colour = choose_colour(dice, kind, scene.backdrop, split == "unseen")
        if colour is None:
            continue
        ways = [
            d
            for d in DIRECTIONS
            if (d in ("left", "right") or height * 2.2 > width)
            and (d in ("up", "down") or width * 2.2 > height)
        ]
        direction = dice.choice(ways)
        sideways = direction in ("left", "right")
        size = min(
            dice.uniform(34, 84) * unit,
            0.42 * (width if sideways else height),
            0.86 * (height if sideways else width),
        )
        if size < 33 * unit:
            continue
        half = size / 2 + unit
        room = (width if sideways else height) - 2 * half
        reach = room * dice.uniform(0.55, 1.0)
        if reach < 0.3 * (width if sideways else height):
            continue
        start = half + dice.uniform(0, room - reach)
        across = dice.uniform(half, (height if sideways else width) - half)
        line = [start + reach * k / (frames - 1) for k in range(frames)]
        if direction in ("left", "up"):
            line.reverse()
        path = [(p, across) if sideways else (across, p) for p in line]
        look = replace(new_look(dice, kind, colour, scene.backdrop))
        if kind in ("car", "bus", "airplane", "bird", "fish", "cat", "boat") and sideways:
            look.flip = direction == "left"
        still = dice.random() < 0.14
        mover = Group(kind, colour, [Thing(*path[0], size, look)])
        try:
            if still:
                wanted = choose_groups(scene, dice, split, 2)
                arrange(scene, wanted, dice)
            else:
                if dice.random() < 0.55:
                    near: list[Spot] = [(*p, size) for p in path]
                    middles = [
                        ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2, size) for a, b in itertools.pairwise(path)
                    ]
                    others = [
                        g
                        for g in choose_groups(scene, dice, "train", 2)
                        if g[2] <= 2 and g[:2] != (kind, colour)
                    ]
                    arrange(scene, others, dice, near + middles)
                scene.groups.insert(0, mover)
        except NoRoom:
            continue
        if split != "unseen" and scene.has_unseen():
            continue
        what = (scene.signature(), "still" if still else direction)
        if split == "unseen" or belongs_to_heldout(what) == (split == "heldout"):
            return scene, None if still else mover, direction, path


def motion_example(dice: Random, split: str) -> Made:
    scene, mover, direction, path = draw_motion(dice, split)
    turns: list[Turn] = []
    for lang in LANGUAGES:
        said = moving(scene, mover, direction, lang, dice)
        for questions, answer in dice.sample(said, len(said) if split == "train" else 2):
            question = vary(dice.choice(questions), lang, dice)
            turns.append(("motion", lang, question, answer))
    pictures, marks = [], []
    for k, (x, y) in enumerate(path):
        if mover:
            mover.things[0].x, mover.things[0].y = x, y
        picture, found = paint(scene, scene.seed + k)
        pictures.append(picture)
        marks.append(found)
    return Made(pictures, turns, marks, "video", split == "unseen")
