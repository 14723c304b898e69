"""One training example: pictures, independent questions with answers, and what stands where."""

from __future__ import annotations

from dataclasses import dataclass, field
from string import ascii_lowercase, ascii_uppercase, digits

import numpy as np

KINDS = (
    "airplane", "car", "bus", "boat", "bird", "fish", "cat", "person", "house",
    "tree", "flower", "sun", "moon", "star", "heart", "circle", "square", "triangle",
)  # fmt: skip
CHARACTERS = digits + ascii_uppercase + ascii_lowercase
CLASSES = ("background", *KINDS, *CHARACTERS)
COLOURS = ("none", "red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white", "gray")

CLASS_INDEX = {name: index for index, name in enumerate(CLASSES)}
COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}

Box = tuple[int, int, int, int]


@dataclass(slots=True)
class Mark:
    """One drawn thing or printed character; `kind` indexes CLASSES, `colour` COLOURS, `box` is in pixels."""

    kind: int
    colour: int
    box: Box


@dataclass(slots=True)
class Example:
    """Pictures uint8 [h, w, 3] and, turn by turn, question and answer, task tag and language.

    The turns are independent of each other: each is a conversation of its own about the same pictures.
    `kind` is "image" or "video" (then the pictures are frames in order); `marks[i]` lists picture i's
    things in painter's order; `unseen` says that a combination kept out of training occurs.
    """

    pictures: list[np.ndarray]
    kind: str
    turns: list[tuple[str, str]]
    tasks: list[str]
    languages: list[str]
    unseen: bool = False
    marks: list[list[Mark]] = field(default_factory=list)
