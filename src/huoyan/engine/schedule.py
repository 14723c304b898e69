"""What one step computes: the scheduler's answer, the runner's orders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from huoyan.engine.sequence import Group, Sequence
    from huoyan.media.types import PreparedPicture


class Chunk(NamedTuple):
    """Compute tokens [start, end) of a sequence; `samples`: the logits after the last one are wanted.

    A tuple, because each step makes one for each sequence.
    """

    sequence: Sequence
    start: int
    end: int
    samples: bool
    drafts: tuple[int, ...] = ()
    """Guesses that stand before `end`: the logits before them and after each are wanted too."""

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass
class Schedule:
    """The order of the runner's work: encode `pictures`, copy blocks, then one forward over `chunks`."""

    decodes: list[Chunk] = field(default_factory=list)
    """One token each, and its drafts. The sequences of a group stand together, in their order."""
    prefills: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Blocks (source, destination): copy on write, before anything is written."""
    pictures: list[PreparedPicture] = field(default_factory=list)
    """Not in the picture cache yet; room for them is reserved there."""
    encodes_beside: bool = False
    """Whether they are encoded beside this step and later ones, so that no prompt of this step reads them."""
    preempted: list[Group] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        return [*self.decodes, *self.prefills]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    def without(self, groups: set[Group]) -> Schedule:
        """The same step without some groups (their requests ended meanwhile)."""
        return Schedule(
            [c for c in self.decodes if c.sequence.group not in groups],
            [c for c in self.prefills if c.sequence.group not in groups],
            self.copies,
            self.pictures,
            self.encodes_beside,
            self.preempted,
        )
