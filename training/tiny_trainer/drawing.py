"""From a drawn example to a training record, or to held-out questions."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from huoyan_training.example import CHARACTERS, CLASSES, COLOURS, Example
from huoyan_training.families import FAMILIES, sample
from tiny_trainer import drills
from tiny_trainer.auxiliary import Classes
from tiny_trainer.generate import Prompted
from tiny_trainer.pictures import CutPictures, cut_pictures
from tiny_trainer.records import Record
from tiny_trainer.sequences import SequenceBuilder, video_max_slices

MARK_CLASSES = Classes(thing=len(CLASSES), colour=len(COLOURS), character=len(CHARACTERS) + 1)

_FIRST_CHARACTER = len(CLASSES) - len(CHARACTERS)
_CONVERSATIONS = 0.12
_BARE_VIDEOS = 0.3


@dataclass(frozen=True, eq=False)
class HeldOut:
    """An example of a split that training never sees, ready to be asked about.

    `one_slice` is the same with pictures not cut, for those that are cut in `prompted`.
    """

    family: str
    split: str
    unseen: bool
    turns: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...]
    languages: tuple[str, ...]
    prompted: Prompted
    one_slice: Prompted | None


_SHARES = {
    "describe": 0.07, "what": 0.1, "colour": 0.02, "count": 0.12, "where": 0.1, "exists": 0.04, "word": 0.22,
    "two": 0.26, "motion": 0.1, "slice": 0.09, "three": 0.02, "chat": 0.01, drills.FAMILY: 0.08,
}  # fmt: skip
"""Of the training: more of what is learned late than the generator's own shares have."""


def mixture() -> dict[str, float]:
    """The generator's families and the drills, with their shares in the training."""
    return {name: _SHARES[name] for name in (*FAMILIES, drills.FAMILY)}


class Recorder:
    """Draws examples and encodes them."""

    def __init__(self, builder: SequenceBuilder) -> None:
        self.builder = builder

    def record(self, rng: random.Random, family: str) -> Record:
        """A training record of a family of `mixture()`."""
        if family == drills.FAMILY:
            return self.encode(drills.draw_drill(rng), family)
        example = sample(np.random.default_rng(rng.getrandbits(63)), family, "train")
        between = "" if rng.random() < _BARE_VIDEOS else "\n"
        return self.encode(example, family, conversation=rng.random() < _CONVERSATIONS, between=between)

    def encode(
        self, example: Example, family: str, *, conversation: bool = False, between: str = "\n"
    ) -> Record:
        """The record of an example: its turns side by side, or as one conversation."""
        cut = self.cut(example)
        row = self.builder.build(
            cut.plans, example.kind, example.turns, conversation=conversation, between=between
        )
        return Record(
            family=family,
            patches=cut.patches,
            marks=cut.marks,
            grids=tuple(cut.grids),
            ids=row.ids,
            positions=row.positions,
            branch=row.branch,
            weights=row.weights,
        )

    def held_out(self, seed: int, family: str, split: str) -> HeldOut:
        """The example that `seed` gives."""
        example = sample(np.random.default_rng(seed), family, split)
        cut = self.cut(example)
        sliced = example.kind == "image" and any(plan.grid is not None for plan in cut.plans)
        return HeldOut(
            family=family,
            split=split,
            unseen=example.unseen,
            turns=tuple(example.turns),
            tasks=tuple(example.tasks),
            languages=tuple(example.languages),
            prompted=self._prompted(example, cut),
            one_slice=self._prompted(example, self.cut(example, max_slice_nums=1)) if sliced else None,
        )

    def cut(self, example: Example, max_slice_nums: int | None = None) -> CutPictures:
        if example.kind == "video" and max_slice_nums is None:
            max_slice_nums = video_max_slices(len(example.pictures))
        return cut_pictures(
            example.pictures,
            example.marks,
            self.builder.rules,
            max_slice_nums=max_slice_nums,
            first_character=_FIRST_CHARACTER,
        )

    def _prompted(self, example: Example, cut: CutPictures) -> Prompted:
        first = self.builder.beginning(cut.plans, example.kind)
        asked = [self.builder.question(q, pictures=bool(cut.plans)) for q, _ in example.turns]
        return Prompted(cut.patches, tuple(cut.grids), tuple((*first, *q) for q in asked))


class HeldOutJob:
    """(seed, family, split) -> `HeldOut`, to be mapped over processes."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __call__(self, job: tuple[int, str, str]) -> HeldOut:
        return self.recorder.held_out(*job)
