"""The families of examples and their share of the training mixture: `sample` is the only way in."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np

from . import chat, motion, pairs, words
from .example import Example
from .painter import paint
from .questions import Made, ask_several
from .scene import Group, Scene, draw_scene
from .splits import SPLITS, unseen_pair

# Every single-picture family also asks the other single-picture questions; its own comes first.
QUESTIONS = {"describe": 1.0, "what": 1.0, "colour": 1.0, "count": 1.0, "where": 1.0, "exists": 1.0}
TRAINING_QUESTIONS = {"describe": 0.5, "what": 2.0, "colour": 0.6, "count": 1.4, "where": 2.2, "exists": 0.8}

FAMILIES: dict[str, float] = {
    "describe": 0.16,
    "what": 0.06,
    "colour": 0.06,
    "count": 0.1,
    "where": 0.09,
    "exists": 0.05,
    "word": 0.16,
    "two": 0.12,
    "motion": 0.1,
    "slice": 0.05,
    "three": 0.03,
    "chat": 0.02,
}


def from_turns(made: Made) -> Example:
    pictures, turns, marks, kind, unseen = made
    return Example(
        pictures,
        kind,
        [(question, answer) for _, _, question, answer in turns],
        [task for task, *_ in turns],
        [language for _, language, *_ in turns],
        unseen,
        marks,
    )


def focus_of(scene: Scene, split: str) -> Group | None:
    """In "unseen" the questions are about the strange group."""
    if split != "unseen":
        return None
    return next((g for g in scene.groups if unseen_pair(g.kind, g.colour, g.count)), None)


def single(dice: Random, family: str, split: str) -> Example:
    while True:
        scene = draw_scene(dice, split, many=family == "count" or (split == "train" and dice.random() < 0.25))
        focus = focus_of(scene, split)
        turns = ask_several(scene, {family: 1.0}, dice, 1, focus)
        if not turns:
            continue
        if split == "train":
            # Asking is cheap beside drawing and seeing. The same of other things in the picture teaches to find them.
            more = ask_several(scene, TRAINING_QUESTIONS, dice, dice.randint(5, 9), focus, spread=False)
            turns += [turn for turn in more if turn[3] != turns[0][3]]
        else:
            others = {task: weight for task, weight in QUESTIONS.items() if task != family}
            turns += ask_several(scene, others, dice, dice.randint(1, 4), focus)
        picture, marks = paint(scene)
        return from_turns(Made([picture], turns, [marks], unseen=scene.has_unseen()))


def sample(rng: np.random.Generator, family: str, split: str) -> Example:
    """One example of the family (a key of FAMILIES) for the split "train", "heldout" or "unseen".

    The same generator state gives the same example. ValueError for a family or split that does not exist.
    """
    if family not in FAMILIES or split not in SPLITS:
        raise ValueError(
            f"no family {family!r} or split {split!r}; families {list(FAMILIES)}, splits {list(SPLITS)}"
        )
    dice = Random(int(rng.integers(1 << 62)))
    if family in QUESTIONS:
        return single(dice, family, split)
    return from_turns(OTHERS[family](dice, split))


OTHERS: dict[str, Callable[[Random, str], Made]] = {
    "word": words.word_example,
    "slice": words.slice_example,
    "two": pairs.two_example,
    "three": pairs.three_example,
    "motion": motion.motion_example,
    "chat": chat.chat_example,
}


def sample_any(
    rng: np.random.Generator, split: str, weights: dict[str, float] | None = None
) -> tuple[str, Example]:
    """A family by its share in the mixture (`weights` or FAMILIES), and an example of it."""
    shares = weights or FAMILIES
    names = list(shares)
    p = np.array([shares[n] for n in names], np.float64)
    family = names[int(rng.choice(len(names), p=p / p.sum()))]
    return family, sample(rng, family, split)
