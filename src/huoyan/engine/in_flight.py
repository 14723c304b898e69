"""A step that was launched and whose tokens the host has not seen yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence as Several

    from numpy.typing import NDArray
    from torch import Tensor

    from huoyan.engine.chooser import Choice
    from huoyan.engine.sequence import Group, Sequence


@dataclass(frozen=True)
class Late:
    """Tokens of a batch that only the device knows."""

    rows: NDArray[np.int64] | None
    """[N] whose they are; None: the batch's first N."""
    places: NDArray[np.int64] | None
    """[N] where each stands in `ids`; None: they are all of these, in order."""
    ids: Tensor
    """int64, on the device."""


@dataclass(frozen=True)
class InFlight:
    """The groups that get tokens, and these as they are on the device."""

    choice: Choice
    groups: list[Group]
    order: list[Sequence | None]
    """Whose each of the choice's `token_ids` is, if it was sampled and nothing was guessed."""
    drafts: dict[Group, tuple[int, ...]] = field(default_factory=dict)
    """The guesses of some groups, which the choice has a token before each of and one after."""

    @staticmethod
    def of(
        choice: Choice, groups: dict[Group, list[int]], drafts: dict[Group, tuple[int, ...]] | None = None
    ) -> InFlight:
        """`groups`: those of the step, with the rows of their logits."""
        order: list[Sequence | None] = []
        for group, count in choice.sampled.items():
            own = group.sequences[: len(groups[group])]
            order.extend(own if count == len(own) else [None] * count)
        return InFlight(choice, list(groups), order, drafts or {})

    @cached_property
    def rows(self) -> dict[Sequence, int]:
        """Where each stands in the choice's `token_ids`."""
        return {seq: row for row, seq in enumerate(self.order) if seq is not None}

    def token(self, sequence: Sequence) -> Tensor:
        """int64 [], on the device: a view, nothing is copied there."""
        ids = self.choice.token_ids
        assert ids is not None
        return ids[self.rows[sequence]]

    def late(self, sequences: Several[Sequence], rows: NDArray[np.int64] | None) -> Late:
        """The tokens of `sequences`, which are `rows` of a batch (None: its first)."""
        ids = self.choice.token_ids
        assert ids is not None
        # As in most steps: nobody came or went.
        same = sequences == self.order
        places = None if same else np.array([self.rows[seq] for seq in sequences], np.int64)
        return Late(rows, places, ids)
