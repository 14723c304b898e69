"""Which combinations belong to which split: decided by tables and stable hashes, never by the seed."""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

from .example import KINDS

SPLITS = ("train", "heldout", "unseen")

# Each colour is left out twice; nothing a person would draw first (a white airplane, a green tree) is.
UNSEEN_COLOUR = {
    "airplane": "purple", "car": "pink", "bus": "black", "boat": "green", "bird": "orange", "fish": "white",
    "cat": "blue", "person": "yellow", "house": "purple", "tree": "pink", "flower": "black", "sun": "green",
    "moon": "red", "star": "orange", "heart": "white", "circle": "blue", "square": "yellow",
    "triangle": "red",
}  # fmt: skip
UNSEEN_COUNT = {kind: 2 + index % 4 for index, kind in enumerate(KINDS)}

Signature = tuple[object, ...]


def unseen_pair(kind: str, colour: str, count: int) -> bool:
    return UNSEEN_COLOUR[kind] == colour or UNSEEN_COUNT[kind] == count


def belongs_to_heldout(signature: Signature) -> bool:
    """A sixteenth of all scene compositions (what, colours, counts, places, backdrop) is never trained on."""
    return crc32(repr(signature).encode()) % 16 == 0


def _unseen_letters(pair: str) -> bool:
    return crc32(pair.lower().encode()) % 23 == 5


def word_split(text: str) -> str:
    """A twelfth of all words is held out; words with certain neighbouring letters are only in "unseen"."""
    if any(_unseen_letters(text[i : i + 2]) for i in range(len(text) - 1)):
        return "unseen"
    return "heldout" if crc32(text.lower().encode()) % 12 == 0 else "train"


def words_of(split: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word_split(word) == split]
