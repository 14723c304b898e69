"""How long a GPU takes for what is launched, without the host: for the scripts beside this one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch


def need_cuda() -> None:
    """End the script in one line where there is no GPU."""
    if not torch.cuda.is_available():
        name = Path(sys.argv[0]).name
        print(f"{name}: it needs a CUDA device, and torch sees none here", file=sys.stderr)
        raise SystemExit(2)


def time_us(run: Callable[[int], object], repeats: int = 20) -> float:
    """Median microseconds of `run(i)`, i from 0 to `repeats` - 1, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(repeats):
                run(i)
        times = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / repeats)
    return sorted(times)[len(times) // 2]
