"""`Video`: a clip, an animation or a list of frames, sampled into pictures."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from huoyan.errors import InputError, MediaError
from huoyan.media.fetch import DEFAULT_POLICY, FetchPolicy, OpenSource, open_source, url_scheme
from huoyan.media.frame_choice import DEFAULT_FPS, DEFAULT_MAX_FRAMES, choose_frames, thin_evenly
from huoyan.media.limits import DEFAULT_LIMITS, MediaLimits
from huoyan.media.picture import Picture
from huoyan.media.types import MediaItem

# The published way to ask about a video: up to this many frames are cut into slices, more are not.
_MAX_SLICED_FRAMES = 16


@dataclass(frozen=True)
class SampledVideo:
    """The pictures that stand for a video.

    `timestamps[i]` (seconds from the first frame) and `indices[i]` (in the order of showing) belong to
    `frames[i]`. For frames given as such, without times, `timestamps` counts seconds as frames and
    `frame_rate` is 0. `warnings` says what was damaged.
    """

    frames: tuple[Picture, ...]
    timestamps: tuple[float, ...]
    indices: tuple[int, ...]
    duration: float
    frame_rate: float
    num_frames: int
    """How many frames there were to choose from."""
    warnings: tuple[str, ...] = ()

    def to_item(self, *, max_slice_nums: int | None = None, use_image_id: bool = False) -> MediaItem:
        """What a prompt's placeholder stands for: without image ids, in 2 slices, in 1 above 16 frames."""
        slices = (
            (1 if len(self.frames) > _MAX_SLICED_FRAMES else 2) if max_slice_nums is None else max_slice_nums
        )
        return MediaItem(self.frames, kind="video", max_slice_nums=slices, use_image_id=use_image_id)


class Video:
    """A video, not yet decoded. `open` it, then `sample` it as often as wanted."""

    def __init__(self, source: Any, *, limits: MediaLimits, policy: FetchPolicy) -> None:
        self._source = source
        self._limits = limits
        self._policy = policy

    @classmethod
    def open(
        cls, source: Any, *, limits: MediaLimits = DEFAULT_LIMITS, policy: FetchPolicy = DEFAULT_POLICY
    ) -> Video:
        """Name a video: a path, a `file:`, `http(s):` or `data:` URL, bytes, a binary file, an animated GIF,
        WebP, PNG or AVIF in any of these ways, an array or tensor [frames, height, width, 3], or a list of
        pictures (anything `Picture.open` takes). Nothing is read before `sample`, but a missing file is
        reported here. Raises MediaError.
        """
        if isinstance(source, Video):
            return source
        if isinstance(source, (str, os.PathLike)) and not str(source).strip():
            raise MediaError("a video's path or URL is empty")
        is_path = isinstance(source, os.PathLike) or (
            isinstance(source, str) and url_scheme(source) in ("", "file")
        )
        if is_path or hasattr(source, "read"):
            with open_source(source, policy, video=True) as opened:
                if isinstance(opened.file, io.BytesIO) and opened.file is not source:
                    # A pipe can be read only once.
                    source = opened.file.getvalue()
        return cls(source, limits=limits, policy=policy)

    def sample(self, *, max_frames: int | None = None, fps: float = DEFAULT_FPS) -> SampledVideo:
        """Decode about `fps` frames a second, at most `max_frames`, evenly.

        `max_frames` is 16 where not given, for a file; frames given as a list or an array are all kept then.
        Files of constant rate: every `round(rate / fps)`th frame, at least every one, then thinned evenly.
        Files of variable rate: what is on screen at 0, 1/fps, 2/fps … seconds, each frame once, then thinned.
        Raises MediaError (not readable, only sound, nothing decodable), InputError (bad parameters).
        """
        if max_frames is not None and (isinstance(max_frames, bool) or max_frames < 1):
            raise InputError(f"max_frames must be at least 1, not {max_frames!r}")
        if not (isinstance(fps, (int, float)) and math.isfinite(fps) and fps > 0):
            raise InputError(f"fps must be above 0, not {fps!r}")
        given = _given_frames(self._source)
        if given is not None:
            return _sample_given(given, max_frames, self._limits, self._policy)
        with open_source(self._source, self._policy, video=True) as opened:
            return _sample_file(opened, max_frames or DEFAULT_MAX_FRAMES, float(fps), self._limits)


def sample_frames(
    source: Any,
    *,
    max_frames: int | None = None,
    fps: float = DEFAULT_FPS,
    limits: MediaLimits = DEFAULT_LIMITS,
    policy: FetchPolicy = DEFAULT_POLICY,
) -> SampledVideo:
    """`Video.open(source).sample(...)` in one call."""
    return Video.open(source, limits=limits, policy=policy).sample(max_frames=max_frames, fps=fps)


def _given_frames(source: Any) -> Sequence[Any] | None:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
        if source.ndim == 4 and source.shape[3] not in (1, 3, 4) and source.shape[1] in (1, 3, 4):
            source = source.transpose(0, 2, 3, 1)
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise MediaError(f"an array of frames is [frames, height, width, 3], not {list(source.shape)}")
        return list(source)
    if isinstance(source, (list, tuple)):
        return source
    return None


def _sample_given(
    frames: Sequence[Any], max_frames: int | None, limits: MediaLimits, policy: FetchPolicy
) -> SampledVideo:
    if not frames:
        raise MediaError("the list of frames is empty")
    indices = thin_evenly(range(len(frames)), max_frames or len(frames))
    return SampledVideo(
        frames=tuple(Picture.open(frames[index], limits=limits, policy=policy) for index in indices),
        timestamps=tuple(float(index) for index in indices),
        indices=tuple(indices),
        duration=float(len(frames)),
        frame_rate=0.0,
        num_frames=len(frames),
    )


def _sample_file(opened: OpenSource, max_frames: int, fps: float, limits: MediaLimits) -> SampledVideo:
    from huoyan.media.decode import is_picture

    head = opened.file.read(64)
    opened.file.seek(0)
    if is_picture(head):
        return _sample_animation(opened, max_frames, fps, limits)
    from huoyan.media.video_decode import decode_frames

    decoded = decode_frames(opened, max_frames, fps, limits)
    return SampledVideo(
        frames=tuple(Picture(pixels) for pixels in decoded.pixels),
        timestamps=decoded.times,
        indices=decoded.indices,
        duration=decoded.duration,
        frame_rate=decoded.frame_rate,
        num_frames=decoded.num_frames,
        warnings=decoded.warnings,
    )


def _sample_animation(opened: OpenSource, max_frames: int, fps: float, limits: MediaLimits) -> SampledVideo:
    from huoyan.media.animation import open_animation

    with open_animation(opened.file, opened.name, limits) as animation:
        rate = animation.num_frames / animation.duration if animation.duration > 0 else 1.0
        indices = choose_frames(animation.times, animation.duration, rate, fps, max_frames)
        frames = tuple(Picture(pixels) for pixels in animation.frames(indices))
        return SampledVideo(
            frames=frames,
            timestamps=tuple(animation.times[index] for index in indices),
            indices=tuple(indices),
            duration=animation.duration,
            frame_rate=rate,
            num_frames=animation.num_frames,
            warnings=tuple(animation.warnings),
        )


__all__ = ["SampledVideo", "Video", "sample_frames"]
