"""How many tokens a request of some pictures takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.errors import InputError
from huoyan.media.slicing import plan_slices

if TYPE_CHECKING:
    from huoyan.media.types import SliceRules

TEXT_TOKENS = 48
"""Of the chat template (some 25 of Qwen2's) and a short question."""
_RESOLUTION = re.compile(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*")


@dataclass(frozen=True)
class RequestShape:
    """One request, in tokens."""

    images: int
    resolution: tuple[int, int]
    """(width, height)"""
    slices: int
    """Of all pictures."""
    prompt_tokens: int
    max_tokens: int

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.max_tokens


def request_shape(
    rules: SliceRules, query_num: int, images: int, resolution: tuple[int, int], max_tokens: int
) -> RequestShape:
    """By the checkpoint's own slicing.

    Raises:
        InputError: a negative count, or a picture that cannot be sliced.
    """
    if images < 0 or max_tokens < 1:
        raise InputError(
            f"a request has 0 pictures or more and 1 token or more, not {images} and {max_tokens}"
        )
    slices = marks = 0
    if images:
        plan = plan_slices(resolution, rules)
        slices = plan.num_slices
        rows = plan.grid[1] if plan.grid else 0
        # A pair of tags a slice, a line's end between rows, one behind the picture; its number in tags.
        marks = 2 * slices + max(rows - 1, 0) + 1
    numbers = sum(2 + len(str(i)) for i in range(images)) if rules.use_image_id else 0
    tokens = TEXT_TOKENS + images * (slices * query_num + marks) + numbers
    return RequestShape(images, resolution, images * slices, tokens, max_tokens)


def parse_resolution(text: str) -> tuple[int, int]:
    """(width, height) of "1344x896".

    Raises:
        InputError: it is not of this form.
    """
    match = _RESOLUTION.fullmatch(text)
    if match is None:
        raise InputError(f"resolution {text!r}: give width and height, such as 1344x896")
    return int(match.group(1)), int(match.group(2))
