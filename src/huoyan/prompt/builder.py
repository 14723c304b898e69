"""Puts a prompt's token ids together from plain text, special tokens and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.errors import InputError, ModelError
from huoyan.prompt.placeholders import Grid, Layout, Mark
from huoyan.prompt.types import PictureSlot

if TYPE_CHECKING:
    from huoyan.prompt.tokenizer import Tokenizer

_REMEMBERED_GRIDS = 128


@dataclass(frozen=True)
class _Written:
    """A picture's ids without its number, where runs begin in them, and the plain text after the last tag."""

    ids: list[int]
    runs: tuple[int, ...]
    number_at: int | None
    tail: str


class PictureCoder:
    """Writes pictures as ids; each grid is worked out once. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, layout: Layout, run_length: int) -> None:
        """`run_length`: placeholder tokens of a slice. Raises ModelError where a tag is no token."""
        self.tokenizer = tokenizer
        self.layout = layout
        self.run_length = run_length
        self.tag_ids: dict[str, int] = {}
        for tag in layout.needed_tags:
            token_id = tokenizer.token_to_id(tag)
            if token_id is None:
                raise ModelError(
                    f"the tokenizer has no token {tag!r}, with which preprocessor_config.json writes "
                    "pictures; the two files are of different checkpoints"
                )
            self.tag_ids[tag] = token_id
        tokenizer.protect(layout.needed_tags)
        self._written: dict[tuple[Grid | None, bool], _Written] = {}

    def write(self, grid: Grid | None, image_id: int | None) -> tuple[list[int], PictureSlot, str]:
        """Ids, where in them the runs begin, and the plain text that follows the last tag."""
        numbered = image_id is not None and self.layout.numbered
        written = self._written.get((grid, numbered))
        if written is None:
            if len(self._written) >= _REMEMBERED_GRIDS:
                self._written.clear()
            written = self._written[grid, numbered] = self._write(grid, numbered)
        if written.number_at is None:
            return written.ids, PictureSlot(written.runs, self.run_length), written.tail
        # The number stands between two tags, so its ids depend on nothing else.
        number = self.tokenizer.encode_plain(str(image_id))
        ids = [*written.ids[: written.number_at], *number, *written.ids[written.number_at :]]
        runs = tuple(run + len(number) for run in written.runs)
        return ids, PictureSlot(runs, self.run_length), written.tail

    def has_written(self, ids: list[int]) -> bool:
        """Whether the ids hold a picture that is written out already."""
        return self._next_written(ids, 0) is not None

    def find_written(self, ids: list[int], grids: Sequence[Grid | None]) -> tuple[PictureSlot, ...]:
        """Slots of pictures that the ids hold already, in order. Raises InputError where they do not fit."""
        slots: list[PictureSlot] = []
        begin = self._next_written(ids, 0)
        for i, grid in enumerate(grids):
            if begin is None:
                raise InputError(f"the token ids hold {i} pictures, but {len(grids)} were given")
            expected, slot, _ = self.write(grid, None)
            end = begin + len(expected)
            if ids[begin:end] != expected:
                shape = "one slice" if grid is None else f"an overview and {grid[0]}x{grid[1]} slices"
                raise InputError(
                    f"the token ids from position {begin} do not spell picture {i}, which takes {shape} of "
                    f"{self.run_length}: write placeholders instead, or fit the ids to the picture's size"
                )
            slots.append(PictureSlot(tuple(begin + offset for offset in slot.offsets), slot.length))
            begin = self._next_written(ids, end)
        if begin is not None:
            raise InputError(f"the token ids hold more pictures than the {len(grids)} that were given")
        return tuple(slots)

    def _next_written(self, ids: list[int], start: int) -> int | None:
        opening, unk = self.tag_ids[self.layout.tags.im_start], self.tag_ids[self.layout.tags.unk]
        while True:
            try:
                start = ids.index(opening, start)
            except ValueError:
                return None
            if ids[start + 1 : start + 2] == [unk]:
                return start
            start += 1

    def _write(self, grid: Grid | None, numbered: bool) -> _Written:
        ids: list[int] = []
        runs: list[int] = []
        number_at: int | None = None
        plain = ""
        for piece in self.layout.pieces(grid, numbered):
            if piece is Mark.NUMBER:
                number_at = len(ids)
            elif piece is Mark.RUN:
                runs.append(len(ids))
                ids += [self.tag_ids[self.layout.tags.unk]] * self.run_length
            elif isinstance(piece, str) and piece in self.tag_ids:
                ids += self.tokenizer.encode_plain(plain)
                plain = ""
                ids.append(self.tag_ids[piece])
            else:
                plain += str(piece)
        return _Written(ids, tuple(runs), number_at, plain)


class PromptBuilder:
    """Collects one prompt. Plain text is encoded only when a special token or a picture ends it, in one
    piece, so that the ids are those of the whole text."""

    def __init__(self, coder: PictureCoder) -> None:
        self.token_ids: list[int] = []
        self._coder = coder
        self._plain: list[str] = []

    def add_text(self, text: str) -> None:
        """Plain text: nothing in it is special."""
        self._plain.append(text)

    def add_ids(self, ids: list[int] | tuple[int, ...]) -> None:
        """Ids as they are: special tokens, or what is encoded already."""
        self._flush()
        self.token_ids += ids

    def add_picture(self, grid: Grid | None, image_id: int | None) -> PictureSlot:
        self._flush()
        ids, slot, tail = self._coder.write(grid, image_id)
        base = len(self.token_ids)
        self.token_ids += ids
        if tail:
            self._plain.append(tail)
        return PictureSlot(tuple(base + offset for offset in slot.offsets), slot.length)

    def finish(self) -> list[int]:
        self._flush()
        return self.token_ids

    def _flush(self) -> None:
        if self._plain:
            self.token_ids += self._coder.tokenizer.encode_plain("".join(self._plain))
            self._plain.clear()
