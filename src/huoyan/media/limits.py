"""How much memory a single picture may ask for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from huoyan.errors import InputError, MediaError
from huoyan.media.types import Size

DEFAULT_MAX_PIXELS = 200_000_000
"""The largest phone sensors and A3 scans at 1200 dpi stay below; about 1.5 GB while it is decoded."""
MAX_PIXELS_VARIABLE = "HUOYAN_MAX_PIXELS"


@dataclass(frozen=True)
class MediaLimits:
    """What a picture or a frame may cost. `None` takes `$HUOYAN_MAX_PIXELS`, else 200 million."""

    max_pixels: int | None = None

    def check_size(self, size: Size, name: str) -> None:
        """Raises MediaError where a picture of `size` (width, height) is over the limit or empty."""
        width, height = size
        if width < 1 or height < 1:
            raise MediaError(f"{name}: the picture is empty ({width}x{height} pixels)")
        allowed = self.allowed_pixels()
        if width * height > allowed:
            raise MediaError(
                f"{name}: {width}x{height} is {width * height / 1e6:.0f} million pixels, over the limit of "
                f"{allowed / 1e6:g} million; make it smaller, or raise max_pixels or {MAX_PIXELS_VARIABLE}"
            )

    def allowed_pixels(self) -> int:
        """The limit in force."""
        if self.max_pixels is not None:
            return self.max_pixels
        text = os.environ.get(MAX_PIXELS_VARIABLE, "").strip()
        if not text:
            return DEFAULT_MAX_PIXELS
        try:
            value = int(float(text))
        except (ValueError, OverflowError):
            value = 0
        if value < 1:
            raise InputError(f"{MAX_PIXELS_VARIABLE}={text!r} must be a number of pixels, such as 400000000")
        return value


DEFAULT_LIMITS = MediaLimits()
