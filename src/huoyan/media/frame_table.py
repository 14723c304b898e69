"""Where in a file each frame is, and where decoding must begin to get it.

Frames are numbered in the order they are shown. Packets come in the order they are decoded; a frame can be
decoded from the last keyframe before it (before it in both orders: what follows a keyframe in the file but
is shown before it may need the frames before that keyframe).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import av

from huoyan.media.frame_choice import keeps_to_rate

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream


# These do not store when a frame is shown; what FFmpeg fills in is wrong where frames are reordered.
_WITHOUT_ORDER = ("avi", "h264", "hevc", "m4v", "mpegvideo", "obu")


@dataclass(frozen=True)
class Start:
    """The packet where decoding begins, known by its presentation time (in the stream's time base)."""

    pts: int
    dts: int | None

    @property
    def seek_to(self) -> int:
        return self.pts if self.dts is None else min(self.pts, self.dts)


@dataclass(frozen=True)
class Target:
    """One wanted frame: its number, when it is shown, where to start, and where else if that fails."""

    index: int
    pts: int
    start: Start
    earlier: Start


@dataclass
class FullTable:
    """Every packet of the stream, read once without decoding: exact for any container with timestamps."""

    pts: list[int]
    """In decode order, as the two below."""
    dts: list[int | None]
    keyframes: list[int]
    order: list[int]
    """Packets in the order they are shown."""
    times: list[float]
    duration: float
    warnings: list[str] = field(default_factory=list)

    def locate(self, indices: Sequence[int]) -> list[Target]:
        return [self._target(index) for index in indices]

    def _target(self, index: int) -> Target:
        packet = self.order[index]
        pts = self.pts[packet]
        place = bisect_right(self.keyframes, packet) - 1
        while place > 0 and self.pts[self.keyframes[place]] > pts:
            place -= 1
        return Target(index, pts, self._start(place), self._start(place - 1))

    def _start(self, place: int) -> Start:
        packet = self.keyframes[place] if place >= 0 and self.keyframes else 0
        return Start(self.pts[packet], self.dts[packet])


def read_full_table(container: InputContainer, stream: VideoStream) -> FullTable | None:
    """Read all packets of `stream` from the beginning; None where they carry no usable timestamps."""
    time_base = float(stream.time_base or 1)
    pts: list[int] = []
    dts: list[int | None] = []
    keyframes: list[int] = []
    shown: list[int] = []
    warnings: list[str] = []
    end = 0
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.pts is None:
                return None
            if packet.is_keyframe:
                keyframes.append(len(pts))
            if not packet.is_discard:
                shown.append(len(pts))
                end = max(end, packet.pts + (packet.duration or 0))
            pts.append(packet.pts)
            dts.append(packet.dts)
    except av.FFmpegError as error:
        warnings.append(f"the file is damaged after {len(pts)} frames ({error.strerror})")
    if container.format.name in _WITHOUT_ORDER and len(keyframes) < len(pts):
        return None
    shown = _without_repeats(shown, pts)
    if shown and stream.frames > len(pts) and not warnings:
        warnings.append(f"the file ends early: {len(pts)} of {stream.frames} frames are there")
    first = pts[shown[0]] if shown else 0
    times = [(pts[packet] - first) * time_base for packet in shown]
    duration = (end - first) * time_base if shown else 0.0
    return FullTable(pts, dts, keyframes, shown, times, duration, warnings)


def _without_repeats(packets: Iterable[int], pts: list[int]) -> list[int]:
    """In the order of showing; two packets of one time (the fields of a picture) are one frame."""
    by_time = {pts[packet]: packet for packet in reversed(list(packets))}
    return [by_time[time] for time in sorted(by_time)]


@dataclass
class IndexTable:
    """An MP4's own index, so that only the packets near wanted frames are read: a long film is not.

    The index has decoding times alone. Where the rate is constant and groups of pictures are closed, the
    frames between two keyframes are the same set in both orders, so the n-th frame is found by sorting the
    presentation times of its own group. `locate` returns None where that does not hold.
    """

    container: InputContainer
    stream: VideoStream
    dts: list[int]
    keyframes: list[int]
    times: list[float]
    """From the index; those of located frames are made exact."""
    duration: float
    warnings: list[str] = field(default_factory=list)

    def locate(self, indices: Sequence[int]) -> list[Target] | None:
        targets: list[Target] = []
        low = high = 0
        group: list[int] = []
        first = self._first_pts()
        if first is None:
            return None
        for index in indices:
            if not low <= index < high:
                place = bisect_right(self.keyframes, index) - 1
                low = self.keyframes[place]
                high = self.keyframes[place + 1] if place + 1 < len(self.keyframes) else len(self.dts)
                read = self._read_group(low, high)
                if read is None:
                    return None
                group = sorted(read)
            pts = group[index - low]
            start = Start(group[0], self.dts[low])
            targets.append(Target(index, pts, start, start))
            self.times[index] = (pts - first) * float(self.stream.time_base or 1)
        return targets

    def _first_pts(self) -> int | None:
        try:
            self.container.seek(self.dts[0], stream=self.stream, backward=True)
            packet = next(iter(self.container.demux(self.stream)))
        except (av.FFmpegError, StopIteration):
            return None
        return packet.pts if packet.dts == self.dts[0] else None

    def _read_group(self, low: int, high: int) -> list[int] | None:
        """Presentation times of packets `low` to `high`; None where they are no closed group."""
        pts: list[int] = []
        border: int | None = None
        try:
            self.container.seek(self.dts[low], stream=self.stream, backward=True)
            for packet in self.container.demux(self.stream):
                if packet.pts is None or packet.dts is None or packet.is_discard:
                    break
                if packet.dts < self.dts[low]:
                    continue
                if len(pts) < high - low:
                    if packet.dts != self.dts[low + len(pts)] or (not pts and not packet.is_keyframe):
                        return None
                    pts.append(packet.pts)
                elif border is None:
                    border = packet.pts
                elif packet.pts < border:
                    return None
                else:
                    break
        except av.FFmpegError:
            return None
        closed = len(set(pts)) == high - low and min(pts) == pts[0] and (border is None or max(pts) < border)
        return pts if closed else None


def read_index_table(
    container: InputContainer, stream: VideoStream, frame_rate: float, fps: float, num_bytes: int
) -> IndexTable | None:
    """The index of a whole, unfragmented MP4 or MOV of constant rate; None for anything else."""
    entries = getattr(stream, "index_entries", None)
    if entries is None or not container.format.name.startswith("mov,"):
        return None
    if not 0 < len(entries) == stream.frames or not frame_rate:
        return None
    dts: list[int] = []
    keyframes: list[int] = []
    for entry in entries:
        if entry.is_discard or entry.pos + entry.size > num_bytes:
            return None
        if entry.is_keyframe:
            keyframes.append(len(dts))
        dts.append(entry.timestamp)
    time_base = float(stream.time_base or 1)
    times = [(value - dts[0]) * time_base for value in dts]
    if not keyframes or keyframes[0] != 0 or not keeps_to_rate(times, frame_rate, fps):
        return None
    return IndexTable(container, stream, dts, keyframes, times, times[-1] + 1 / frame_rate)
