"""Sampling videos: the frames must be exactly those of a full decode, whatever is skipped on the way."""

from __future__ import annotations

import io
import itertools
import os
import random
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from huoyan.errors import HuoyanError, InputError, MediaError
from huoyan.media import video_decode
from huoyan.media.fetch import FetchPolicy
from huoyan.media.frame_choice import choose_frames, every_so_often, thin_evenly
from huoyan.media.limits import MediaLimits
from huoyan.media.picture import Picture
from huoyan.media.video import Video, sample_frames
from tests.media.clips import clip, decoded_in_full, drawn, number_of


def recipe_indices(num_frames: int, average_rate: float, max_frames: int) -> list[int]:
    """What the published script does with decord's frame count and average rate, written again."""
    picked, at = [], 0
    while at < num_frames:
        picked.append(at)
        at += max(round(average_rate / 1), 1)
    if len(picked) > max_frames:
        gap = len(picked) / max_frames
        picked = [picked[int(gap / 2 + gap * i)] for i in range(max_frames)]
    return picked


def test_choice_equals_the_recipe_on_constant_rates() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(2000):
        count = rng.randint(1, 4000)
        rate = rng.choice(
            [24, 25, 30, 60, 24000 / 1001, 30000 / 1001, 0.2, 0.5, 1, 1.5, 2.5, rng.uniform(0.1, 120)]
        )
        most = rng.choice([1, 2, 5, 16, 64])
        expected = recipe_indices(count, rate, most)
        assert every_so_often(count, rate, 1.0, most) == expected
        times = [i / rate for i in range(count)]
        assert choose_frames(times, count / rate, rate, 1.0, most) == expected


def test_choice_by_time_is_what_is_on_screen() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(500):
        times = sorted({0.0, *(round(rng.uniform(0, 30), 3) for _ in range(rng.randint(2, 60)))})
        duration = times[-1] + round(rng.uniform(0, 3), 3)
        fps = rng.choice([0.5, 1.0, 2.0])
        ticks = [k / fps for k in range(200) if k / fps < duration or k / fps == times[-1]]
        wanted = sorted({max(i for i, t in enumerate(times) if t <= tick) for tick in ticks})
        assert choose_frames(times, duration, 1000.0, fps, 1000) == wanted
    endless = [0.0, 1.0, 1e12]
    assert choose_frames(endless, 1e15, 25.0, 1.0, 16) == [0, 1, 2]


def test_thinning_is_even() -> None:
    assert thin_evenly([7, 8], 5) == [7, 8]
    assert thin_evenly(range(100), 1) == [50]
    for count in range(1, 60):
        for most in range(1, count + 1):
            picked = thin_evenly(range(count), most)
            assert len(picked) == most
            gaps = {b - a for a, b in itertools.pairwise(picked)}
            assert all(abs(gap - count / most) < 1 for gap in gaps)
            assert abs(picked[0] - (count - 1 - picked[-1])) <= 1


MATRIX: list[tuple[str, dict[str, Any]]] = [
    ("h264 mp4", {}),
    ("h264 mp4 index first", {"container_options": {"movflags": "faststart"}}),
    ("h264 fragmented mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    ("h264 medium", {"options": {"preset": "medium", "g": "40"}}),
    (
        "h264 open gop",
        {"options": {"preset": "fast", "g": "25", "x264-params": "open-gop=1:bframes=3:scenecut=0"}},
    ),
    (
        "h264 refreshed bit by bit",
        {"options": {"preset": "fast", "g": "25", "x264-params": "intra-refresh=1"}},
    ),
    ("h264 all keyframes", {"options": {"preset": "ultrafast", "g": "1"}}),
    ("h264 one keyframe", {"options": {"preset": "fast", "g": "9999", "x264-params": "scenecut=0"}}),
    ("h264 interlaced", {"options": {"preset": "fast", "g": "30", "x264-params": "tff=1"}}),
    ("h264 mkv", {"container": "matroska"}),
    ("h264 ts", {"container": "mpegts"}),
    ("h264 flv", {"container": "flv"}),
    ("h264 avi", {"container": "avi"}),
    ("h264 raw", {"container": "h264"}),
    (
        "hevc mp4",
        {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "keyint=30:log-level=none"}},
    ),
    ("vp8 webm", {"codec": "libvpx", "container": "webm", "options": {"g": "30", "deadline": "realtime"}}),
    (
        "vp8 webm with hidden frames",
        {
            "codec": "libvpx",
            "container": "webm",
            "options": {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "10"},
        },
    ),
    (
        "vp9 webm",
        {"codec": "libvpx-vp9", "container": "webm", "options": {"g": "30", "deadline": "realtime"}},
    ),
    ("av1 mp4", {"codec": "libsvtav1", "options": {"preset": "12", "g": "30", "svtav1-params": "lp=1"}}),
    ("mpeg2 ts", {"codec": "mpeg2video", "container": "mpegts", "options": {"g": "15", "bf": "2"}}),
    ("mpeg2 ps", {"codec": "mpeg2video", "container": "vob", "options": {"g": "15", "bf": "2"}}),
    ("mpeg4 avi", {"codec": "mpeg4", "container": "avi", "options": {"g": "20", "bf": "2"}}),
    ("mjpeg avi", {"codec": "mjpeg", "container": "avi"}),
    ("mjpeg mov", {"codec": "mjpeg", "container": "mov"}),
]


@pytest.mark.parametrize(("name", "options"), MATRIX, ids=[name for name, _ in MATRIX])
def test_frames_are_those_of_a_full_decode(name: str, options: dict[str, Any], capfd: Any) -> None:
    codec = options.get("codec", "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    count, rate = 130, 25
    data = clip(count, rate=rate, **options)
    capfd.readouterr()
    full = decoded_in_full(data)
    for fps, most in ((1.0, 16), (5.0, 7), (25.0, 40)):
        sampled = sample_frames(data, fps=fps, max_frames=most)
        assert sampled.warnings == ()
        assert abs(sampled.num_frames - count) <= 1
        if sampled.num_frames == count == len(full):
            assert list(sampled.indices) == every_so_often(count, rate, fps, most)
        for index, time, picture in zip(sampled.indices, sampled.timestamps, sampled.frames, strict=True):
            np.testing.assert_array_equal(picture.pixels, full[index])
            assert time == pytest.approx(index / rate, abs=0.002)
        if len(full) == count:
            assert [number_of(picture.pixels) for picture in sampled.frames] == list(sampled.indices)
    assert sampled.frame_rate == pytest.approx(rate, rel=0.02)
    assert sampled.duration == pytest.approx(count / rate, abs=0.1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["h264 mp4", "h264 medium", "h264 all keyframes", "mjpeg mov"])
def test_the_index_of_an_mp4_is_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(130, **dict(MATRIX)[name])
    by_packets = sample_frames(data)
    with monkeypatch.context() as patch:
        patch.setattr(video_decode, "read_index_table", lambda *_: None)
        assert sample_frames(data) == by_packets
    monkeypatch.delattr(video_decode, "read_full_table")
    assert sample_frames(data) == by_packets


def test_every_kind_of_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(50)
    path = tmp_path / "a: clip, 视频.mp4"
    path.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    expected = sample_frames(data).frames
    assert len(expected) == 2
    with open(path, "rb") as file:
        for source in (path, str(path), path.name, path.as_uri(), file, io.BytesIO(data)):
            video = Video.open(source)
            assert video.sample().frames == expected
            assert video.sample().frames == expected
    assert sample_frames(Video.open(data)).frames == expected


def test_a_pipe_can_be_sampled_twice() -> None:
    data = clip(50)
    reader, writer = os.pipe()

    def feed() -> None:
        with os.fdopen(writer, "wb") as sink:
            sink.write(data)

    threading.Thread(target=feed, daemon=True).start()
    with os.fdopen(reader, "rb") as pipe:
        video = Video.open(pipe)
    assert video.sample() == video.sample() == sample_frames(data)


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_rotation_is_undone(degrees: int) -> None:
    turns = degrees // 90 % 4
    upright = drawn(5, 160, 96) if turns % 2 == 0 else drawn(5, 96, 160)
    stored = np.ascontiguousarray(np.rot90(upright, -turns))
    data = clip(3, rotation=degrees, draw=lambda _: stored)
    frame = sample_frames(data).frames[0]
    assert frame.size == (upright.shape[1], upright.shape[0])
    assert number_of(frame.pixels) == 5


def test_mirrored_display_matrix() -> None:
    data = bytearray(clip(3, draw=lambda _: np.ascontiguousarray(drawn(5)[:, ::-1])))
    track = data.index(b"tkhd")
    matrix = data.index((0x10000).to_bytes(4, "big") + bytes(12) + (0x10000).to_bytes(4, "big"), track)
    data[matrix : matrix + 4] = (-0x10000 & 0xFFFFFFFF).to_bytes(4, "big")
    assert number_of(sample_frames(bytes(data)).frames[0].pixels) == 5


def test_variable_rate_goes_by_time() -> None:
    # Two seconds at 20 fps, then eight seconds at 2 fps, then one frame that stays for five seconds.
    times = [i / 20 for i in range(40)] + [2 + i / 2 for i in range(16)] + [10.0, 15.0]
    for container in ("mp4", "matroska"):
        data = clip(len(times), times=times, container=container)
        sampled = sample_frames(data, max_frames=64)
        wanted = sorted({max(i for i, t in enumerate(times) if t <= k + 1e-3) for k in range(16)})
        assert list(sampled.indices) == wanted
        assert [number_of(p.pixels) for p in sampled.frames] == wanted
        np.testing.assert_allclose(sampled.timestamps, [times[i] for i in wanted], atol=2e-3)
        few = sample_frames(data, max_frames=4)
        assert list(few.indices) == thin_evenly(wanted, 4)


def test_a_little_jitter_is_still_constant_rate() -> None:
    rng = np.random.default_rng(1)
    times = [max(0.0, i / 25 + float(rng.uniform(-0.01, 0.01))) for i in range(100)]
    sampled = sample_frames(clip(100, times=times, container="matroska"), max_frames=64)
    assert [index % 25 for index in sampled.indices] == [0] * len(sampled.indices)


@pytest.mark.parametrize("rate", [Fraction(1, 5), Fraction(2, 5), Fraction(1, 2), 1, 2])
def test_slow_clips(rate: Fraction | int) -> None:
    sampled = sample_frames(clip(9, rate=rate))
    step = max(1, round(float(rate)))
    assert list(sampled.indices) == list(range(0, 9, step))
    assert [number_of(p.pixels) for p in sampled.frames] == list(sampled.indices)


def test_one_frame() -> None:
    sampled = sample_frames(clip(1))
    assert sampled.indices == (0,)
    assert sampled.timestamps == (0.0,)


def test_missing_duration_and_count() -> None:
    class Pipe(io.RawIOBase):
        """Cannot seek, so the muxer cannot go back to write durations and counts."""

        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, chunk: Any) -> int:
            self.data += bytes(chunk)
            return len(chunk)

    pipe = Pipe()
    source = clip(75, container="matroska")
    with av.open(io.BytesIO(source)) as given, av.open(pipe, "w", format="matroska") as output:
        stream = output.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    data = bytes(pipe.data)
    with av.open(io.BytesIO(data)) as container:
        assert container.duration is None
        assert container.streams.video[0].frames == 0
    sampled = sample_frames(data)
    assert (sampled.num_frames, sampled.indices) == (75, (0, 25, 50))
    assert sampled.duration == pytest.approx(3.0, abs=0.05)


def test_sound_beside_the_pictures() -> None:
    sampled = sample_frames(clip(50, audio=True))
    assert [number_of(p.pixels) for p in sampled.frames] == [0, 25]


def sound_only(container: str = "mp4", cover: bool = False) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        sound: Any = output.add_stream("aac", rate=8000)
        picture: Any = output.add_stream("mjpeg", rate=1) if cover else None
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = 160, 96, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        output.mux(sound.encode(silence))
        output.mux(sound.encode(None))
        if picture is not None:
            output.mux(picture.encode(av.VideoFrame.from_ndarray(drawn(1), format="rgb24")))
            output.mux(picture.encode(None))
    return buffer.getvalue()


def test_only_sound() -> None:
    with pytest.raises(MediaError, match="only sound"):
        sample_frames(sound_only())
    with pytest.raises(MediaError, match="only sound"):
        sample_frames(sound_only(cover=True))


def test_a_file_cut_short_gives_what_is_there_and_says_so() -> None:
    whole = clip(200, container_options={"movflags": "faststart"})
    full = decoded_in_full(whole)
    sampled = sample_frames(whole[: len(whole) * 6 // 10], fps=5)
    assert 80 < sampled.num_frames < 160
    assert sampled.warnings
    assert "200" in sampled.warnings[0]
    for index, picture in list(zip(sampled.indices, sampled.frames, strict=True))[:-1]:
        np.testing.assert_array_equal(picture.pixels, full[index])
    with pytest.raises(MediaError, match="damaged"):
        sample_frames(clip(50)[:3000])


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_damage_in_the_middle(container: str, capfd: Any) -> None:
    data = bytearray(clip(250, container=container))
    full = decoded_in_full(bytes(data))
    middle = len(data) // 2
    data[middle : middle + 1500] = np.random.default_rng(5).integers(0, 256, 1500, dtype=np.uint8).tobytes()
    sampled = sample_frames(bytes(data), fps=5)
    assert len(sampled.frames) >= 7
    same = [
        index < len(full) and np.array_equal(picture.pixels, full[index])
        for index, picture in zip(sampled.indices, sampled.frames, strict=True)
    ]
    assert sum(same) >= 5
    assert capfd.readouterr().err == ""


def test_random_damage_never_shows_a_traceback() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    originals = [clip(30, container=c) for c in ("mp4", "matroska", "mpegts", "avi")]
    for _ in range(60):
        data = bytearray(rng.choice(originals))
        if rng.random() < 0.4:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice([0, 1, 20])):
            if data:
                data[int(rng.random() ** 2 * len(data))] = rng.randrange(256)
        try:
            sampled = sample_frames(bytes(data), fps=5, limits=MediaLimits(max_pixels=1_000_000))
        except HuoyanError as error:
            message = str(error)
        else:
            message = ""
            assert len(sampled.frames) == len(sampled.indices) == len(sampled.timestamps) > 0
        assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a video"),
        (b"just some text, not a film at all\n" * 40, "not a video"),
        (b"#EXTM3U\n#EXTINF:5,\n/etc/hostname\n#EXT-X-ENDLIST\n", "not a video"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "not a video"),
    ],
)
def test_what_is_no_video(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(MediaError, match=words) as caught:
            sample_frames(source)
        assert "\n" not in str(caught.value)


def test_playlists_open_nothing(tmp_path: Path) -> None:
    (tmp_path / "real.ts").write_bytes(clip(30, container="mpegts"))
    playlist = tmp_path / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1.2,\nreal.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError, match="not a video"):
        sample_frames(playlist)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        Video.open(tmp_path / "none.mp4")
    with pytest.raises(MediaError, match="is a folder"):
        Video.open(str(tmp_path))
    with pytest.raises(MediaError, match="empty"):
        Video.open(" ")
    with pytest.raises(MediaError, match="cannot open a int"):
        sample_frames(5)
    data = clip(3)
    for bad in (0, -1, True):
        with pytest.raises(InputError, match="max_frames"):
            sample_frames(data, max_frames=bad)
    for fps in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="fps"):
            sample_frames(data, fps=fps)
    with pytest.raises(MediaError, match="over the limit"):
        sample_frames(data, limits=MediaLimits(max_pixels=1000))
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(MediaError, match="not allowed"):
        sample_frames(tmp_path / "a.mp4", policy=FetchPolicy.for_server())


# ---- animations and given frames


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animated_pictures(format: str) -> None:
    # 300 ms each, the fourth for two seconds.
    durations = [300, 300, 300, 2000, 300, 300, 300]
    images = [Image.fromarray(drawn(number)) for number in range(7)]
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    images[0].save(buffer, format, save_all=True, append_images=images[1:], duration=durations, **options)
    sampled = sample_frames(buffer.getvalue())
    starts = np.cumsum([0, *durations]) / 1000
    wanted = sorted({max(i for i in range(7) if starts[i] <= k + 1e-6) for k in range(4)})
    assert list(sampled.indices) == wanted
    assert [number_of(p.pixels) for p in sampled.frames] == wanted
    np.testing.assert_allclose(sampled.timestamps, starts[wanted], atol=0.02)
    assert sampled.duration == pytest.approx(starts[-1], abs=0.02)
    assert len(sample_frames(buffer.getvalue(), max_frames=2).frames) == 2


def test_transparent_animation_shows_white() -> None:
    frames = [Image.new("RGBA", (20, 20), (0, 0, 0, 0)) for _ in range(3)]
    for index, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (index * 5, 0, index * 5 + 5, 5))
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=1000, disposal=2)
    sampled = sample_frames(buffer.getvalue())
    assert sampled.indices == (0, 1, 2)
    for index, picture in enumerate(sampled.frames):
        assert tuple(picture.pixels[15, 15]) == (255, 255, 255)
        assert tuple(picture.pixels[2, index * 5 + 2]) == (255, 0, 0)


def test_a_still_picture_is_a_video_of_one_frame() -> None:
    buffer = io.BytesIO()
    Image.fromarray(drawn(9)).save(buffer, "PNG")
    sampled = sample_frames(buffer.getvalue())
    assert sampled.indices == (0,)
    np.testing.assert_array_equal(sampled.frames[0].pixels, drawn(9))


def test_frames_given_as_such() -> None:
    torch = pytest.importorskip("torch")
    frames = [drawn(number) for number in range(20)]
    array = np.stack(frames)
    tensor = torch.from_numpy(array)
    images = [Image.fromarray(frame) for frame in frames]
    for source in (array, array / 255, frames, images, tuple(frames), tensor, tensor.permute(0, 3, 1, 2)):
        sampled = sample_frames(source)
        assert sampled.num_frames == 20
        assert [number_of(p.pixels) for p in sampled.frames] == list(range(20))
        thinned = sample_frames(source, max_frames=6)
        assert list(thinned.indices) == thin_evenly(range(20), 6)
        assert thinned.frames == tuple(Picture.open(frames[i]) for i in thinned.indices)
    for bad in ([], array[0], array[:0]):
        with pytest.raises(MediaError, match=r"empty|\[frames, height, width, 3\]"):
            sample_frames(bad)


def test_items() -> None:
    sampled = sample_frames([drawn(0)] * 16)
    item = sampled.to_item()
    assert (item.kind, item.max_slice_nums, item.use_image_id, item.pictures) == (
        "video",
        2,
        False,
        sampled.frames,
    )
    assert sample_frames([drawn(0)] * 17).to_item().max_slice_nums == 1
    assert sampled.to_item(max_slice_nums=3, use_image_id=True).max_slice_nums == 3
