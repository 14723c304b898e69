"""Writes a request's pictures into its prompt, each at its placeholder."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from huoyan.errors import InputError
from huoyan.prompt.builder import PictureCoder, PromptBuilder
from huoyan.prompt.placeholders import PLACEHOLDERS
from huoyan.prompt.types import EncodedPrompt, PictureSlot

if TYPE_CHECKING:
    from huoyan.media.types import MediaItem, SlicePlan


class PictureRules(Protocol):
    def plan(self, picture: Any, item: MediaItem) -> SlicePlan: ...

    def is_numbered(self, item: MediaItem) -> bool: ...


class PictureWriter:
    """One prompt in the making. Items of a kind are used up in their order."""

    def __init__(self, coder: PictureCoder, items: Sequence[MediaItem], rules: PictureRules) -> None:
        """Raises InputError for an item that no placeholder can stand for."""
        self.builder = PromptBuilder(coder)
        self._rules = rules
        self._items = items
        self._slots: list[list[PictureSlot]] = [[] for _ in items]
        self._waiting: dict[str, deque[int]] = {kind: deque() for kind in PLACEHOLDERS}
        self._images = 0
        for i, item in enumerate(items):
            if item.kind not in self._waiting:
                raise InputError(f"item {i} is of kind {item.kind!r}: use 'image' or 'video'")
            if not item.pictures:
                raise InputError(f"{item.kind} {i} of the prompt holds no picture")
            if item.kind == "image" and len(item.pictures) != 1:
                raise InputError(
                    f"image {i} of the prompt holds {len(item.pictures)} pictures: make each its own item"
                )
            self._waiting[item.kind].append(i)

    def check(self, found: Sequence[str]) -> None:
        """Raises InputError unless the placeholders (their kinds) are as many as the items."""
        counts = Counter(found)
        for kind, placeholder in PLACEHOLDERS.items():
            there, given = counts[kind], len(self._waiting[kind])
            if there != given:
                written = f"{there} {kind} placeholder{'' if there == 1 else 's'} {placeholder}"
                were = f"{given} {kind}{' was' if given == 1 else 's were'}"
                raise InputError(f"the prompt has {written}, but {were} given: write one for each")

    def add_next(self, kind: str, between: str = "") -> None:
        """Write the next item of the kind, its pictures with `between` between them."""
        index = self._waiting[kind].popleft()
        item = self._items[index]
        numbered = self._rules.is_numbered(item)
        for i, picture in enumerate(item.pictures):
            if i and between:
                self.builder.add_text(between)
            number = self._images + i if numbered else None
            self._slots[index].append(self.builder.add_picture(self._rules.plan(picture, item).grid, number))
        if kind == "image":
            self._images += 1

    def finish(self, text: str | None) -> EncodedPrompt:
        """Raises InputError for a prompt without tokens."""
        ids = self.builder.finish()
        if not ids:
            raise InputError("the prompt is empty: it must have at least one token")
        return EncodedPrompt(ids, tuple(slot for slots in self._slots for slot in slots), text)
