"""Keeps what a user writes from becoming a special token, a picture or a turn.

Before a chat template sees a text, whatever in it looks special is swapped for a sentinel nobody can guess;
the template's own special tokens are then the only ones in its result, and the sentinels are swapped back.
Everything else of the text stays in place: templates may trim or inspect it, and the ids of an innocent text
are those of the whole rendered text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import Generic, TypeVar

from huoyan.errors import ModelError

_T = TypeVar("_T")

# Private-use characters: no case, no whitespace, no meaning in JSON or Jinja.
_NONCE_FIRST, _NONCE_LAST = 0xE100, 0xF8FF
_DIGIT_ZERO = 0xE000
_TO_DIGITS = {ord(str(d)): chr(_DIGIT_ZERO + d) for d in range(10)}
_FROM_DIGITS = {_DIGIT_ZERO + d: str(d) for d in range(10)}


class Sentinels(Generic[_T]):
    """Unguessable stand-ins for objects inside one text."""

    def __init__(self, texts: Iterable[str]) -> None:
        """`texts` are all that the sentinels will stand among."""
        texts = list(texts)
        while True:
            span = _NONCE_LAST - _NONCE_FIRST + 1
            nonce = "".join(chr(_NONCE_FIRST + secrets.randbelow(span)) for _ in range(12))
            self._crumbs = [half[i : i + 2] for half in (nonce[:6], nonce[6:]) for i in range(5)]
            if not any(crumb in text for crumb in self._crumbs for text in texts):
                break
        self._before, self._after = nonce[:6], nonce[6:]
        self._hidden: list[_T] = []
        self._pattern = re.compile(f"{self._before}([\ue000-\ue009]+){self._after}")

    def stand_in(self, value: _T) -> str:
        """A text to stand for `value`; each call gives another."""
        self._hidden.append(value)
        return f"{self._before}{str(len(self._hidden) - 1).translate(_TO_DIGITS)}{self._after}"

    def split(self, text: str) -> list[str | Hidden[_T]]:
        """The text around the sentinels, and what they stand for, in order.

        Raises ModelError where a sentinel was cut to pieces.
        """
        pieces: list[str | Hidden[_T]] = []
        start = 0
        for match in self._pattern.finditer(text):
            pieces.append(text[start : match.start()])
            pieces.append(Hidden(self._hidden[int(match.group(1).translate(_FROM_DIGITS))]))
            start = match.end()
        pieces.append(text[start:])
        if any(crumb in piece for piece in pieces if isinstance(piece, str) for crumb in self._crumbs):
            raise ModelError(
                "the chat template cuts the messages to pieces; only templates that keep them whole work"
            )
        return [piece for piece in pieces if piece != ""]


class Hidden(Generic[_T]):
    """What a sentinel stood for."""

    __slots__ = ("value",)

    def __init__(self, value: _T) -> None:
        self.value = value


class MarkerFinder:
    """Finds what looks special in a text, given the special tokens."""

    def __init__(self, markers: Iterable[str]) -> None:
        self._markers = tuple(sorted(set(markers), key=len, reverse=True))
        self._whole = re.compile("|".join(map(re.escape, self._markers)) or r"(?!)")
        self._heads = {m[:n] for m in self._markers for n in range(1, len(m))}
        self._tails = {m[n:] for m in self._markers for n in range(1, len(m))}
        self._longest = max(map(len, self._markers), default=0)

    def spans(self, text: str, edges: bool = True) -> list[tuple[int, int]]:
        """Where markers stand in the text, and where its edges could become one with what comes next to it.

        Disjoint, in order.
        """
        spans = [match.span() for match in self._whole.finditer(text)]
        if not edges:
            return spans
        left, right = len(text) - len(text.lstrip()), len(text.rstrip())
        # A template may trim: look at the edges with and without the white space.
        for begin, end in {(0, len(text)), (left, right)}:
            stretch = range(min(self._longest, end - begin), 0, -1)
            if head := next((n for n in stretch if text[end - n : end] in self._heads), 0):
                spans.append((end - head, end))
            if tail := next((n for n in stretch if text[begin : begin + n] in self._tails), 0):
                spans.append((begin, begin + tail))
            if (
                begin < end
                and end - begin < self._longest
                and any(text[begin:end] in m for m in self._markers)
            ):
                spans.append((begin, end))
        return _merged(spans)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
