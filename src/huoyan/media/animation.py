"""Animated GIF, WebP, PNG and AVIF through Pillow, which knows their transparency and their own timing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from huoyan.media.decode import image_to_rgb, loaded_to_rgb, opened_image
from huoyan.media.limits import MediaLimits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import ImageFile

_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
# Browsers take delays this short for a mistake and show such frames for a tenth of a second.
_SHORTEST_MS, _INSTEAD_MS = 10.0, 100.0


class Animation:
    """An animated picture's timing and frames; a still picture is one frame."""

    def __init__(self, image: ImageFile.ImageFile, name: str) -> None:
        self._image = image
        self._name = name
        animated = image.format in _ANIMATED and getattr(image, "is_animated", False)
        self.num_frames: int = getattr(image, "n_frames", 1) if animated else 1
        self.warnings: list[str] = []
        self.times, self.duration = self._timing()

    def _timing(self) -> tuple[list[float], float]:
        """When each frame appears, and when the last one goes, in seconds."""
        if self.num_frames == 1:
            return [0.0], 0.0
        times: list[float] = []
        now = 0.0
        for index in range(self.num_frames):
            try:
                self._image.seek(index)
                self._image.load()
            except Exception:
                if index == 0:
                    raise
                self.warnings.append(f"the file is damaged after {index} of {self.num_frames} frames")
                self.num_frames = index
                break
            delay = float(self._image.info.get("duration") or 0.0)
            times.append(now / 1000)
            now += delay if delay > _SHORTEST_MS else _INSTEAD_MS
        return times, now / 1000

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames at `indices` (rising), each uint8 [height, width, 3]."""
        if self.num_frames == 1:
            yield from (loaded_to_rgb(self._image, self._name) for _ in indices)
            return
        for index in indices:
            self._image.seek(index)
            self._image.load()
            yield image_to_rgb(self._image, self._name)


@contextmanager
def open_animation(file: BinaryIO, name: str, limits: MediaLimits) -> Iterator[Animation]:
    """Raises MediaError as `decode_picture` does."""
    with opened_image(file, name, limits) as image:
        yield Animation(image, name)
