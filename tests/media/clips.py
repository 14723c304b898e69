"""Small videos made on the spot: each frame shows its own number, as sixteen bars that survive any codec."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT = 160, 96
BITS = 16


def drawn(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A moving gradient, and along the top the bits of `number`."""
    y, x = np.mgrid[0:height, 0:width]
    grey = ((x * 2 + y + number * 5) % 200 + 20).astype(np.uint8)
    rgb = np.stack([grey, np.roll(grey, 30, 1), 255 - grey], 2)
    for bit in range(BITS):
        on = number >> bit & 1
        rgb[: height // 3, bit * width // BITS : (bit + 1) * width // BITS] = 255 if on else 0
    return rgb


def number_of(pixels: np.ndarray) -> int:
    """Reads back what `drawn` wrote, from an upright frame of any size."""
    height, width, _ = pixels.shape
    row = pixels[: height // 4].mean(axis=(0, 2))
    centres = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    return sum((row[max(0, c - 1) : c + 2].mean() > 128) << bit for bit, c in enumerate(centres))


def clip(
    num_frames: int,
    *,
    rate: Fraction | int = 25,
    codec: str = "libx264",
    container: str = "mp4",
    options: dict[str, str] | None = None,
    times: Sequence[float] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int | None = None,
    audio: bool = False,
    draw: Callable[[int], np.ndarray] = drawn,
) -> bytes:
    """`num_frames` of `draw`, shown at `times` (seconds) or at a constant `rate`."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "clip"
    if options is None:
        options = {"preset": "ultrafast", "g": "30", "bf": "3", "x264-params": "b-pyramid=normal"}
        options = options if codec == "libx264" else {}
    first = draw(0)
    with folder, av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = first.shape[1], first.shape[0]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = output.add_stream("aac", rate=8000) if audio else None
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            silence.sample_rate = 8000
            output.mux(sound.encode(silence))
            output.mux(sound.encode(None))
        output.close()
        return path.read_bytes()


def decoded_in_full(data: bytes) -> list[np.ndarray]:
    """Every frame, in the order of showing, by the plainest loop there is."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
