"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass


@dataclass(frozen=True)
class StopResult:
    text: str
    """What may be shown now."""
    stop: str | None = None
    """The stop string that was met: the text ends here."""


class StopStringMatcher:
    """Finds the first stop string to be completed, wherever the pieces are cut.

    Of several completed by the same character the longest counts, so that the result does not depend on
    the pieces. Text that could still become a stop string is held back.
    """

    def __init__(self, stop: Sequence[str] = (), include_stop_str_in_output: bool = False) -> None:
        """`stop` must not hold empty strings (`SamplingParams` refuses them)."""
        self._stops = tuple(dict.fromkeys(stop))
        self._include = include_stop_str_in_output
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str, check: bool = True) -> StopResult:
        """Take more text. With `check` False (while under min_tokens) none of it can stop or begin a stop."""
        text = self._held + text
        self._held = ""
        if not check or not self._stops or not text:
            return StopResult(text)
        met = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if met:
            end, at, stop = min(met)
            return StopResult(text[: end if self._include else at], stop)
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return StopResult(text[: len(text) - keep])

    def final(self) -> str:
        """What was held back and turned out to be no stop string. Call once, at the end."""
        held, self._held = self._held, ""
        return held

    def copy(self) -> StopStringMatcher:
        """One that goes on from here by itself (answers of one prompt fork)."""
        return copy(self)

    def _beginning(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
