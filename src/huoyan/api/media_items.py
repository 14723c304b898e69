"""From `multi_modal_data` and message parts to the items that a prompt's placeholders stand for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huoyan.api.side_by_side import open_each
from huoyan.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from huoyan.media.fetch import FetchPolicy
    from huoyan.media.limits import MediaLimits
    from huoyan.media.types import MediaItem

_PROCESSOR_KEYS = ("max_slice_nums", "use_image_id", "max_frames", "num_frames", "fps")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")


@dataclass(frozen=True)
class MediaChoices:
    """How pictures are cut and numbered and videos sampled; None leaves it to the checkpoint."""

    max_slice_nums: int | None = None
    use_image_id: bool | None = None
    max_frames: int | None = None
    """Frames of a video at most (vLLM calls it `num_frames`)."""
    fps: float | None = None
    """Frames looked at per second of video."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> MediaChoices:
        """Read `mm_processor_kwargs`, or the recipe's dict of pictures.

        Raises:
            InputError: an unknown key or a value out of its range.
        """
        for key in values:
            if key not in _PROCESSOR_KEYS:
                raise UnsupportedError(f"{where} has {', '.join(_PROCESSOR_KEYS)}, not {key!r}")
        numbered, fps = values.get("use_image_id"), values.get("fps")
        slices = _count(values, "max_slice_nums", where)
        frames = _count(values, "max_frames", where) or _count(values, "num_frames", where)
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not fps > 0):
            raise InputError(f"{where}: fps must be a number above 0 (got {fps!r})")
        if numbered is not None and not isinstance(numbered, bool):
            raise InputError(f"{where}: use_image_id must be true or false (got {numbered!r})")
        return cls(slices, numbered, frames, fps)

    def over(self, other: MediaChoices) -> MediaChoices:
        """These choices, and `other`'s where they leave one open."""
        return MediaChoices(
            other.max_slice_nums if self.max_slice_nums is None else self.max_slice_nums,
            other.use_image_id if self.use_image_id is None else self.use_image_id,
            other.max_frames if self.max_frames is None else self.max_frames,
            other.fps if self.fps is None else self.fps,
        )


class MediaReader:
    """Opens the pictures and videos of requests within one policy. Safe to share between threads."""

    def __init__(
        self, policy: FetchPolicy, limits: MediaLimits, most: Mapping[str, int] | None = None
    ) -> None:
        """`most` is `limit_mm_per_prompt`."""
        self._policy = policy
        self._limits = limits
        self._most = most or {}

    def items(self, data: Mapping[str, Any], choices: MediaChoices) -> list[MediaItem]:
        """The items of one prompt's `multi_modal_data`: its images, then its videos.

        Raises:
            InputError: something in it is not a picture or a video, or there are too many.
        """
        items = self._images(data.get("image"), choices) + self._videos(data.get("video"), choices)
        self.check_counts(items)
        return items

    def load_each(self, parts: Sequence[tuple[str, Any]], choices: MediaChoices) -> list[MediaItem]:
        """The items of message parts, each (kind, source), opened side by side."""
        images = [source for kind, source in parts if kind != "video"]
        videos = [source for kind, source in parts if kind == "video"]
        found = {
            False: iter(open_each(images, lambda source: self.load("image", source, choices))),
            True: iter(open_each(videos, lambda source: self.load("video", source, choices))),
        }
        return [next(found[kind == "video"]) for kind, _ in parts]

    def load(self, kind: str, source: Any, choices: MediaChoices) -> MediaItem:
        """The item of one message part."""
        if kind == "video" or is_video(source):
            return self._video(source, choices)
        return self._image(source, choices)

    def check_counts(self, items: Sequence[MediaItem]) -> None:
        """Raises InputError where a prompt has more items than `limit_mm_per_prompt` allows."""
        for kind, most in self._most.items():
            count = sum(item.kind == kind for item in items)
            if count > most:
                raise InputError(
                    f"the prompt has {count} {kind}s and limit_mm_per_prompt allows {most}: "
                    "raise it, or send fewer"
                )

    def _images(self, value: Any, choices: MediaChoices) -> list[MediaItem]:
        if value is None:
            return []
        if isinstance(value, Mapping):
            rest = {key: entry for key, entry in value.items() if key != "images"}
            if "images" not in value:
                raise InputError("multi_modal_data['image'] is a dict without 'images'")
            choices = MediaChoices.parse(rest, "multi_modal_data['image']").over(choices)
            value = value["images"]
        return open_each(_sequence(value, single_ndim=3), lambda source: self._image(source, choices))

    def _image(self, source: Any, choices: MediaChoices) -> MediaItem:
        from huoyan.media.picture import Picture
        from huoyan.media.types import MediaItem

        picture = Picture.open(source, limits=self._limits, policy=self._policy)
        return MediaItem((picture,), "image", choices.max_slice_nums, choices.use_image_id)

    def _videos(self, value: Any, choices: MediaChoices) -> list[MediaItem]:
        if value is None:
            return []
        if isinstance(value, (list, tuple)) and value and not _is_frame(value[0]):
            return open_each(value, lambda source: self._video(source, choices))
        return [self._video(value, choices)]

    def _video(self, source: Any, choices: MediaChoices) -> MediaItem:
        from huoyan.media.frame_choice import DEFAULT_FPS
        from huoyan.media.video import SampledVideo, Video

        if isinstance(source, SampledVideo):
            sampled = source
        else:
            video = Video.open(source, limits=self._limits, policy=self._policy)
            sampled = video.sample(max_frames=choices.max_frames, fps=choices.fps or DEFAULT_FPS)
        return sampled.to_item(max_slice_nums=choices.max_slice_nums, use_image_id=bool(choices.use_image_id))


def is_video(source: Any) -> bool:
    """Whether it is a `Video`, sampled or not; where none was ever made, nothing is imported."""
    module = sys.modules.get("huoyan.media.video")
    return module is not None and isinstance(source, (module.Video, module.SampledVideo))


def is_video_name(source: Any) -> bool:
    """Whether a path or URL ends as videos do."""
    if not isinstance(source, (str, os.PathLike)):
        return False
    name = os.fspath(source)
    return isinstance(name, str) and name.lower().partition("?")[0].endswith(VIDEO_SUFFIXES)


def _count(values: Mapping[str, Any], key: str, where: str) -> int | None:
    value = values.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{where}: {key} must be a whole number of at least 1 (got {value!r})")
    return value


def _sequence(value: Any, single_ndim: int) -> list[Any]:
    """A list of pictures, or one picture alone; an array with one more dimension is a list."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if getattr(value, "ndim", None) == single_ndim + 1:
        return list(value)
    return [value]


def _is_frame(value: Any) -> bool:
    """Whether a list that begins with this is the frames of one video, not several videos."""
    if isinstance(value, (str, os.PathLike, bytes)) or hasattr(value, "read"):
        return False
    if isinstance(value, (list, tuple)) or is_video(value):
        return False
    return getattr(value, "ndim", 3) <= 3
