"""What changes while training goes on; `progress` runs from 0 to 1 by the clock."""

from __future__ import annotations

from collections.abc import Mapping

from tiny_trainer.evaluation import GOALS

_WARM_STEPS = 100
_FLAT_UNTIL = 0.3
_HEAD_START = 300
_WITHOUT_GOAL = 0.7


def learning_rate_scale(step: int, progress: float) -> float:
    """Rises over the first steps, stays, and falls in a straight line to 0."""
    warm = min(1.0, (step + 1) / _WARM_STEPS)
    return warm * min(1.0, max(0.0, (1 - progress) / (1 - _FLAT_UNTIL)))


def head_start(step: int) -> float:
    """Of the auxiliary losses at the start of a run: heads that know nothing learn before they may teach."""
    return 0.003 if step < _HEAD_START else 1.0


def auxiliary_scale(progress: float) -> float:
    """Seeing is taught first; in the end only answers count."""
    return max(0.05, 1.0 - progress / 0.8)


def in_four_bits(step: int, progress: float, start: float) -> bool:
    """Whether a step sees the decoder as int4 will have it: every other one from progress `start` on, so that answers
    are learned that do not hang on the last bits, and those with all bits are not forgotten."""
    return progress >= start and step % 2 == 1


def family_weights(
    base: Mapping[str, float], accuracy: Mapping[str, float], progress: float
) -> dict[str, float]:
    """Families that are answered badly come more often, the more so the later; sums to 1. Those that no goal is set
    for cost the others time: they come a little less often while they are answered well.

    Args:
        base: the generator's own weights.
        accuracy: of the latest look at held-out examples; what has none (the drills) fades.
    """
    pull = min(1.0, progress / 0.3)
    wanted = {}
    for name, weight in base.items():
        if name in accuracy and name not in GOALS:
            weight *= 1.0 - pull + pull * min(1.0, _WITHOUT_GOAL + max(0.0, 0.9 - accuracy[name]))
        elif name in accuracy:
            weight *= 1.0 - pull + pull * (0.3 + 2.8 * min(1.0 - accuracy[name], 0.4))
        elif accuracy:
            weight *= 1.0 - 0.7 * progress
        wanted[name] = weight
    total = sum(wanted.values())
    return {name: weight / total for name, weight in wanted.items()}
