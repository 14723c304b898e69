"""Sixteen frames of a ten-minute 1080p clip: the time against decoding it all, and the peak memory.

    python benchmarks/video_decode.py [--minutes 10] [--frames 16] [--clip FILE]

Makes an H.264 clip (x264, keyframe every 250 frames, 3 B-frames, about 5 Mbit/s) in the temporary folder
where none is given, keeps it for the next run, and measures each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RATE = 30
CHUNK = 500


def make_clip(path: Path, minutes: float) -> None:
    """Encode 500 frames once, and repeat their packets: decoding costs the same as if each were encoded."""
    import av
    import numpy as np

    rng = np.random.default_rng(0)
    coarse = rng.integers(30, 220, (90, 160), dtype=np.uint8)
    scene = np.kron(coarse, np.ones((16, 16), np.uint8)).astype(np.int16)
    scene = np.clip(scene + rng.integers(-12, 13, scene.shape), 0, 255).astype(np.uint8)
    scene = np.concatenate([scene, scene], axis=1)
    packets: list[tuple[bytes, int, int, bool]] = []
    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4") as output:
        stream: Any = output.add_stream(
            "libx264", rate=RATE, options={"preset": "veryfast", "g": "250", "bf": "3", "crf": "23"}
        )
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        frame = av.VideoFrame(1920, 1080, "yuv420p")

        def keep(encoded: list[Any]) -> None:
            packets.extend((bytes(p), p.pts, p.dts, p.is_keyframe) for p in encoded)

        for number in range(CHUNK):
            left, top = 3 * number, (2 * number) % 300
            luma = scene[top : top + 1080, left : left + 1920].copy()
            luma[400:600, (number * 7) % 1700 :][:, :200] = 235
            np.frombuffer(frame.planes[0], np.uint8).reshape(1080, -1)[:, :1920] = luma
            for plane in (1, 2):
                chroma = np.frombuffer(frame.planes[plane], np.uint8).reshape(540, -1)
                chroma[:, :960] = luma[::2, ::2] // 4 + 96
            frame.pts = number
            keep(stream.encode(frame))
        keep(stream.encode(None))
        unit = (1 / RATE) / float(stream.codec_context.time_base)
        for repeat in range(max(1, round(minutes * 60 * RATE / CHUNK))):
            for data, pts, dts, key in packets:
                packet = av.Packet(data)
                shift = round(repeat * CHUNK * unit)
                packet.pts, packet.dts, packet.is_keyframe = pts + shift, dts + shift, key
                packet.stream, packet.time_base = stream, stream.codec_context.time_base
                output.mux(packet)
    os.replace(partial, path)


def measure(way: str, clip: str, frames: int) -> None:
    """Runs in a child: prints seconds, peak resident memory, and what came out."""
    start = time.perf_counter()
    if way == "all":
        import av

        with av.open(clip) as container:
            container.streams.video[0].thread_type = "AUTO"
            count = sum(1 for _ in container.decode(video=0))
    else:
        from huoyan.media.video import sample_frames

        count = len(sample_frames(clip, max_frames=frames).frames)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": peak_resident(), "frames": count}))


def peak_resident() -> int:
    """Bytes. Linux's getrusage would also count what the parent held before it started this process."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(way: str, clip: Path, frames: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", way, "--clip", str(clip), "--frames", str(frames)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return result


def tell(what: str, result: dict[str, float]) -> None:
    print(f"{result['frames']:.0f} {what}: {result['seconds']:.2f} s, peak {result['peak'] / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--only-sample", action="store_true", help="leave out decoding it all")
    parser.add_argument("--way", choices=["all", "sample"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, str(options.clip), options.frames)
        return
    clip = options.clip or Path(tempfile.gettempdir()) / f"huoyan-bench-{options.minutes:g}min-1080p.mp4"
    if not clip.exists():
        print(f"making {clip} …", flush=True)
        make_clip(clip, options.minutes)
    print(f"{clip.name}: {clip.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores")
    sample = run("sample", clip, options.frames)
    tell("frames sampled", sample)
    if options.only_sample:
        return
    whole = run("all", clip, options.frames)
    tell("frames decoded", whole)
    print(f"sampling takes 1/{whole['seconds'] / sample['seconds']:.1f} of the time")


if __name__ == "__main__":
    main()
