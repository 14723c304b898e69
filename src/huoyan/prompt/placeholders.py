"""How a picture is written in a prompt: its tags, and their order in each version of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from huoyan.errors import ModelError
from huoyan.models.config import read_json

Grid = tuple[int, int]
"""(columns, rows)"""

IMAGE_PLACEHOLDER = "(<image>./</image>)"
VIDEO_PLACEHOLDER = "(<video>./</video>)"
PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
"""What stands for an item in the text of a prompt, by its kind."""


@dataclass(frozen=True)
class Tags:
    """The special tokens around pictures, as `preprocessor_config.json` names them."""

    im_start: str = "<image>"
    im_end: str = "</image>"
    slice_start: str = "<slice>"
    slice_end: str = "</slice>"
    im_id_start: str = "<image_id>"
    im_id_end: str = "</image_id>"
    unk: str = "<unk>"

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tags:
        """Read `preprocessor_config.json`; tags it does not name keep their published spelling."""
        path = Path(folder) / "preprocessor_config.json"
        config: Mapping[str, Any] = read_json(path)
        found: dict[str, str] = {}
        for name in cls.__dataclass_fields__:
            value = config.get(name, config.get(f"{name}_token"))
            if isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if not isinstance(value, str) or not value:
                raise ModelError(f"{path}: {name} must be the text of a token, not {value!r}")
            found[name] = value
        return cls(**found)


class Mark(Enum):
    """What of a picture's writing is neither a tag nor plain text."""

    RUN = "run"
    """The placeholder tokens of one slice."""
    NUMBER = "number"
    """The picture's number in the prompt."""


class Layout:
    """Version 2.6 and later: every slice has its own pair of tags, and a picture its number."""

    numbered = True

    def __init__(self, tags: Tags) -> None:
        self.tags = tags

    @property
    def needed_tags(self) -> tuple[str, ...]:
        t = self.tags
        return (t.im_start, t.im_end, t.slice_start, t.slice_end, t.im_id_start, t.im_id_end, t.unk)

    def pieces(self, grid: Grid | None, numbered: bool) -> list[str | Mark]:
        """Tags, plain text and marks in order: the number, the overview, the cells row by row."""
        t = self.tags
        out: list[str | Mark] = [t.im_id_start, Mark.NUMBER, t.im_id_end] if numbered else []
        out += [t.im_start, Mark.RUN, t.im_end]
        columns, rows = grid or (0, 0)
        for row in range(rows):
            if row:
                out.append("\n")
            out += [t.slice_start, Mark.RUN, t.slice_end] * columns
        return out


class SharedPairLayout(Layout):
    """Versions 2.0 and 2.5: cells look like overviews, one pair of slice tags holds them all, no numbers."""

    numbered = False

    @property
    def needed_tags(self) -> tuple[str, ...]:
        t = self.tags
        return (t.im_start, t.im_end, t.slice_start, t.slice_end, t.unk)

    def pieces(self, grid: Grid | None, numbered: bool) -> list[str | Mark]:
        t = self.tags
        out: list[str | Mark] = [t.im_start, Mark.RUN, t.im_end]
        if grid is not None:
            columns, rows = grid
            out.append(t.slice_start)
            for row in range(rows):
                if row:
                    out.append("\n")
                out += [t.im_start, Mark.RUN, t.im_end] * columns
            out += [t.slice_end, "\n"]
        return out


def layout_for(version: str, tags: Tags) -> Layout:
    """The layout of a version such as "2.6"."""
    return SharedPairLayout(tags) if version in ("2.0", "2.5") else Layout(tags)
