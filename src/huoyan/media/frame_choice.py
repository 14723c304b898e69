"""Which frames stand for a video: about one a second, then at most N, evenly."""

from __future__ import annotations

import math
from collections.abc import Sequence

DEFAULT_MAX_FRAMES = 16
DEFAULT_FPS = 1.0
_SAME = 1e-6


def every_so_often(num_frames: int, frame_rate: float, fps: float, max_frames: int) -> list[int]:
    """Indices at a constant rate: every `round(frame_rate / fps)`th frame, thinned evenly to `max_frames`.

    A clip slower than `fps` keeps every frame.
    """
    step = max(1, round(frame_rate / fps))
    return thin_evenly(range(0, num_frames, step), max_frames)


def thin_evenly(indices: Sequence[int], max_frames: int) -> list[int]:
    """At most `max_frames` of `indices`: the middle one of each of `max_frames` equal shares."""
    if len(indices) <= max_frames:
        return list(indices)
    share = len(indices) / max_frames
    return [indices[int(i * share + share / 2)] for i in range(max_frames)]


def choose_frames(
    times: Sequence[float], duration: float, frame_rate: float, fps: float, max_frames: int
) -> list[int]:
    """Indices for frames shown at `times` (seconds from the first, rising) until `duration`.

    Where the frames keep to `frame_rate`, this is `every_so_often`. Where counting frames would be off by
    more than half an interval somewhere, the rate is variable, and the frames on screen at 0, 1/fps, 2/fps …
    seconds are taken instead, each once.
    """
    if keeps_to_rate(times, frame_rate, fps):
        return every_so_often(len(times), frame_rate, fps, max_frames)
    shown = []
    for index, time in enumerate(times):
        gone = times[index + 1] if index + 1 < len(times) else max(duration, time + 2 * _SAME)
        # Damaged files can claim years: the first tick of each frame is computed, ticks are not counted.
        tick = math.ceil((time - _SAME) * fps) / fps
        if tick + _SAME < gone:
            shown.append(index)
    return thin_evenly(shown or [0], max_frames)


def keeps_to_rate(times: Sequence[float], frame_rate: float, fps: float) -> bool:
    """Whether every frame is shown within half an interval (or a frame, where that is longer) of its turn."""
    slack = max(0.5 / fps, 1.0 / frame_rate)
    return all(abs(time - index / frame_rate) <= slack for index, time in enumerate(times))
