"""Decode chosen frames of a video file, and as little else as possible."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import av
import av.logging
import numpy as np

from huoyan.errors import MediaError
from huoyan.media.decode import readable_errors
from huoyan.media.fetch import OpenSource
from huoyan.media.frame_choice import choose_frames, every_so_often
from huoyan.media.frame_table import FullTable, IndexTable, Start, Target, read_full_table, read_index_table
from huoyan.media.limits import MediaLimits

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from numpy.typing import NDArray

# Formats that hold pictures themselves. Playlists (HLS, DASH, concat) name other files and addresses, and a
# stranger's upload must not make this machine open those.
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,mxf,dv,nut,h264,hevc,av1,obu,m4v,mjpeg,"
    "yuv4mpegpipe,rm,gif,apng,aac,mp3,wav,flac"
)
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}

# Decoders that leave out pictures no other picture is built from, and give the rest unchanged.
_SKIPS_NON_REFERENCE = ("h264", "mpeg2video", "mpeg1video")
_MAX_THREADS = 4


@dataclass(frozen=True)
class DecodedFrames:
    """`pixels[i]` (uint8 [height, width, 3], upright) is frame `indices[i]`, shown at `times[i]` seconds."""

    pixels: tuple[NDArray[np.uint8], ...]
    indices: tuple[int, ...]
    times: tuple[float, ...]
    duration: float
    frame_rate: float
    num_frames: int
    warnings: tuple[str, ...]


def decode_frames(opened: OpenSource, max_frames: int, fps: float, limits: MediaLimits) -> DecodedFrames:
    """Choose frames by `choose_frames` and decode them.

    Only from the nearest keyframe to each wanted frame is anything decoded, and of that only what the frame
    is built from. Damaged stretches are left out, with a warning. Raises MediaError: no video in it, not a
    video, nothing decodable.
    """
    num_bytes = opened.file.seek(0, os.SEEK_END)
    with readable_errors(opened.name, "video"):
        return _decode(opened, num_bytes, max_frames, fps, limits)


def _decode(
    opened: OpenSource, num_bytes: int, max_frames: int, fps: float, limits: MediaLimits
) -> DecodedFrames:
    with _container(opened) as container:
        stream = _video_stream(container, opened.name, limits)
        decoder = _Decoder(opened, container, stream, limits)
        rate = float(stream.average_rate or 0)
        index = read_index_table(container, stream, rate, fps, num_bytes)
        if index is None:
            return _decode_by_packets(decoder, max_frames, fps)
        decoded = decoder.by_index(index, every_so_often(len(index.times), rate, fps, max_frames))
    if decoded is not None:
        return decoded
    with _container(opened) as container:
        stream = _video_stream(container, opened.name, limits)
        return _decode_by_packets(_Decoder(opened, container, stream, limits), max_frames, fps)


def _decode_by_packets(decoder: _Decoder, max_frames: int, fps: float) -> DecodedFrames:
    table = read_full_table(decoder.container, decoder.stream)
    if table is None:
        return decoder.by_counting(max_frames, fps)
    if not table.times:
        raise MediaError(f"{decoder.name}: there are no frames in it" + _because(table.warnings))
    return decoder.by_table(table, max_frames, fps)


def _because(warnings: Sequence[str]) -> str:
    return f" ({warnings[0]})" if warnings else ""


@contextmanager
def _container(opened: OpenSource) -> Iterator[InputContainer]:
    # FFmpeg reads a plain file without the interpreter's lock; "file:" keeps a name with a colon a name.
    source: Any = opened.file if opened.path is None else f"file:{os.path.abspath(opened.path)}"
    opened.file.seek(0)
    try:
        container = av.open(source, mode="r", options=dict(_OPTIONS), metadata_errors="replace")
    except (av.FFmpegError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(
            f"{opened.name}: not a video that can be read, or damaged ({' '.join(reason.split())[:100]})"
        ) from None
    with container:
        yield container


def _video_stream(container: InputContainer, name: str, limits: MediaLimits) -> VideoStream:
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & av.stream.Disposition.attached_pic and stream.codec_context is not None
    ]
    if not streams:
        kind = "there is only sound in it" if container.streams.audio else "there is no video in it"
        raise MediaError(f"{name}: {kind}")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    context = stream.codec_context
    if context.width and context.height:
        limits.check_size((context.width, context.height), name)
    context.thread_type = "AUTO"
    context.thread_count = min(_MAX_THREADS, os.cpu_count() or 1)
    return stream


class _Decoder:
    def __init__(
        self, opened: OpenSource, container: InputContainer, stream: VideoStream, limits: MediaLimits
    ) -> None:
        self.opened = opened
        self.container = container
        self.stream = stream
        self.context = stream.codec_context
        self.name = opened.name
        self.limits = limits
        self.skips = self.context.name in _SKIPS_NON_REFERENCE
        self.seeks_well = True

    # ---- with timestamps

    def by_table(self, table: FullTable, max_frames: int, fps: float) -> DecodedFrames:
        rate = self._rate(table)
        indices = choose_frames(table.times, table.duration, rate, fps, max_frames)
        found = self._decode_targets(table.locate(indices))
        missing = [index for index in indices if index not in found]
        if missing:
            # A keyframe may be one in name only (streams refreshed little by little): begin one earlier.
            again = [replace(target, start=target.earlier) for target in table.locate(missing)]
            found.update(self._decode_targets(again))
        missing = [index for index in indices if index not in found]
        if missing and not self.seeks_well:
            found.update(self._shown_at({table.pts[table.order[index]]: index for index in missing}))
        return self._result(found, indices, table, rate)

    def by_index(self, table: IndexTable, indices: list[int]) -> DecodedFrames | None:
        """None where the index does not tell enough, or a frame is not where it says."""
        targets = table.locate(indices)
        if targets is None:
            return None
        found = self._decode_targets(targets)
        if len(found) < len(indices):
            return None
        return self._result(found, indices, table, float(self.stream.average_rate or 0))

    def _result(
        self,
        found: dict[int, NDArray[np.uint8]],
        indices: list[int],
        table: FullTable | IndexTable,
        rate: float,
    ) -> DecodedFrames:
        warnings = [*table.warnings]
        if len(found) < len(indices):
            warnings.append(f"{len(indices) - len(found)} of {len(indices)} frames are damaged and left out")
        if not found:
            raise MediaError(f"{self.name}: none of its frames can be decoded{_because(warnings)}")
        kept = sorted(found)
        return DecodedFrames(
            pixels=tuple(found[index] for index in kept),
            indices=tuple(kept),
            times=tuple(table.times[index] for index in kept),
            duration=table.duration,
            frame_rate=rate,
            num_frames=len(table.times),
            warnings=tuple(warnings),
        )

    def _rate(self, table: FullTable) -> float:
        if self.stream.average_rate:
            return float(self.stream.average_rate)
        span = table.times[-1]
        return (len(table.times) - 1) / span if span > 0 else 1.0

    def _decode_targets(self, targets: Sequence[Target]) -> dict[int, NDArray[np.uint8]]:
        """Decode group by group of targets with a common start."""
        found: dict[int, NDArray[np.uint8]] = {}
        for start, group in groupby(targets, key=lambda target: target.start):
            wanted = {target.pts: target.index for target in group}
            for frame in self._run(start, set(wanted)):
                if frame.pts in wanted:
                    found[wanted[frame.pts]] = self._pixels(frame)
        return found

    def _run(self, start: Start, wanted: set[int]) -> Iterator[VideoFrame]:
        """Frames decoded from `start` until all of `wanted` (timestamps) went in."""
        waiting = set(wanted)
        self.context.flush_buffers()
        try:
            self.container.seek(start.seek_to, stream=self.stream, backward=True)
            reached = False
            for packet in self.container.demux(self.stream):
                if packet.size == 0:
                    break
                if not reached:
                    reached = packet.pts == start.pts
                    if not reached:
                        if packet.dts is not None and start.dts is not None and packet.dts > start.dts:
                            break
                        continue
                is_wanted = packet.pts in waiting
                waiting.discard(packet.pts)
                self.context.skip_frame = "NONREF" if self.skips and not is_wanted else "DEFAULT"
                yield from _feed(self.stream, packet)
                if not waiting:
                    break
            self.seeks_well &= reached
            yield from _feed(self.stream, None)
        except av.FFmpegError:
            self.seeks_well = False
        finally:
            self.context.skip_frame = "DEFAULT"
            self.context.flush_buffers()

    def _shown_at(self, wanted: dict[int, int]) -> dict[int, NDArray[np.uint8]]:
        """Where seeking fails: all from the beginning, taking what is on screen at each wanted time."""
        found: dict[int, NDArray[np.uint8]] = {}
        pending = sorted(wanted)
        last: VideoFrame | None = None
        for frame in self._all_frames():
            while pending and last is not None and frame.pts is not None and frame.pts > pending[0]:
                found[wanted[pending.pop(0)]] = self._pixels(last)
            last = frame
            if not pending:
                break
        if pending and last is not None and last.pts is not None and last.pts <= pending[0]:
            found[wanted[pending[0]]] = self._pixels(last)
        return found

    # ---- without timestamps

    def by_counting(self, max_frames: int, fps: float) -> DecodedFrames:
        """Raw streams and old AVI files: frames are counted, then decoded in one pass."""
        rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        count = sum(1 for _ in self._all_frames())
        if count == 0:
            raise MediaError(f"{self.name}: none of its frames can be decoded")
        indices = every_so_often(count, rate, fps, max_frames)
        wanted = set(indices)
        pixels = [self._pixels(frame) for i, frame in enumerate(self._all_frames()) if i in wanted]
        return DecodedFrames(
            pixels=tuple(pixels),
            indices=tuple(indices),
            times=tuple(index / rate for index in indices),
            duration=count / rate,
            frame_rate=rate,
            num_frames=count,
            warnings=(),
        )

    def _all_frames(self) -> Iterator[VideoFrame]:
        with _container(self.opened) as container:
            stream = _video_stream(container, self.name, self.limits)
            try:
                for packet in container.demux(stream):
                    if packet.size:
                        yield from _feed(stream, packet)
                yield from _feed(stream, None)
            except av.FFmpegError:
                return

    # ---- pixels

    def _pixels(self, frame: VideoFrame) -> NDArray[np.uint8]:
        self.limits.check_size((frame.width, frame.height), self.name)
        pixels: Any = frame.to_ndarray(format="rgb24")
        return _upright(pixels, _display_matrix(frame))


def _feed(stream: VideoStream, packet: Any) -> list[VideoFrame]:
    try:
        return stream.codec_context.decode(packet)
    except av.FFmpegError:
        # One broken packet spoils its own picture; the decoder goes on with the next.
        return []


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int] | None:
    """The part of the frame's display matrix that turns and mirrors: x' = ax + cy, y' = bx + dy."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    values = np.frombuffer(data, dtype=np.int32)
    return int(values[0]), int(values[1]), int(values[3]), int(values[4])


def _upright(pixels: NDArray[np.uint8], matrix: tuple[int, int, int, int] | None) -> NDArray[np.uint8]:
    if matrix is not None:
        a, b, c, d = matrix
        if abs(b) > abs(a):
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        if a < 0:
            pixels = pixels[:, ::-1]
        if d < 0:
            pixels = pixels[::-1]
    pixels = np.ascontiguousarray(pixels)
    pixels.flags.writeable = False
    return pixels
