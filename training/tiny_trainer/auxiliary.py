"""What the encoder must name in each patch while it learns to see. The heads are thrown away at the end.

Without them the only lesson is a few answer tokens for 256 patches, and seeing starts late.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from tiny_trainer.grids import READ_POINTS


@dataclass(frozen=True)
class Classes:
    """How many classes the channels of `Record.marks` have: thing, colour, thing at its middle, and the
    character in the left and in the right half of a patch; 0 is nothing in each of them."""

    thing: int
    colour: int
    character: int

    @property
    def of_channels(self) -> tuple[int, ...]:
        return self.thing, self.colour, self.thing, self.character, self.character


_NOTHING_WEIGHTS = (0.15, 0.15, 0.02, 0.02, 0.02)
"""Nothing is drawn in most patches: so much does it count to say so."""
_PRESENCE = 3


class AuxiliaryHeads(nn.Module):
    """Linear readings of the encoder's output (what is in this patch?) and of the resampler's (what is in
    this query's cell, and which characters, in order?)."""

    def __init__(self, width: int, hidden: int, classes: Classes) -> None:
        super().__init__()
        self.classes = classes
        self.of_patch = nn.Linear(width, sum(classes.of_channels))
        self.of_query = nn.Linear(hidden, sum(classes.of_channels[:_PRESENCE]))
        self.read = nn.Linear(hidden, READ_POINTS * classes.character)
        for head in (self.of_patch, self.of_query, self.read):
            nn.init.normal_(head.weight, 0.0, 0.02)
            nn.init.zeros_(head.bias)
        # Most classes are absent from most cells.
        nn.init.constant_(self.of_query.bias, -4.0)

    def patch_loss(self, x: Tensor, marks: Tensor, real: Tensor) -> Tensor:
        """x [P, width], marks [P, channels], real bool [P] -> the mean over channels of a cross-entropy."""
        losses = []
        for scores, target, nothing in zip(
            self.of_patch(x).float().split(self.classes.of_channels, -1),
            marks.long().unbind(1),
            _NOTHING_WEIGHTS,
            strict=True,
        ):
            losses.append(_balanced(scores, target, nothing, real))
        return torch.stack(losses).mean()

    def query_loss(self, y: Tensor, drawn: Tensor, letters: Tensor, real: Tensor) -> Tensor:
        """y [queries, hidden]: which classes are drawn in its cell, and the characters there.

        Args:
            drawn: [queries, patches of a cell, channels]
            letters: [queries, READ_POINTS]
            real: bool [queries], False for padding.
        """
        drawn = drawn.long()
        count = real.sum().clamp(min=1)
        losses = []
        for channel, scores in enumerate(
            self.of_query(y).float().split(self.classes.of_channels[:_PRESENCE], -1)
        ):
            target = torch.zeros_like(scores).scatter_(1, drawn[:, :, channel], 1.0)[:, 1:]
            loss = binary_cross_entropy_with_logits(
                scores[:, 1:], target, weight=1.0 + 4.0 * target, reduction="none"
            )
            losses.append((loss.sum(1) * real).sum() / count)
        scores = self.read(y).float().unflatten(-1, (READ_POINTS, -1))
        there = real[:, None].expand(-1, READ_POINTS).flatten()
        losses.append(_balanced(scores.flatten(0, 1), letters.long().flatten(), _NOTHING_WEIGHTS[-1], there))
        return torch.stack(losses).mean()


def _balanced(scores: Tensor, target: Tensor, nothing: float, real: Tensor) -> Tensor:
    weight = (nothing + (1.0 - nothing) * (target > 0)) * real
    return (cross_entropy(scores, target, reduction="none") * weight).sum() / weight.sum().clamp(min=1e-6)
