"""Where and how CUDA graphs of steps are captured."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that steps run on, since cuBLAS keeps 32 MiB for every one that it has seen; on the default stream,
    where nothing can be captured, one for all."""
    current = torch.cuda.current_stream(device)
    return _aside(device) if current == torch.cuda.default_stream(device) else current


def run_and_capture(
    graph: torch.cuda.CUDAGraph,
    rehearse: Callable[[], None],
    forward: Callable[[], None],
    pool: Any,
    device: torch.device,
) -> None:
    """Run `rehearse`, for what is compiled or loaded on first use, then capture `forward` in `pool` (see
    `GraphMemory`)."""
    stream = capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rehearse()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        forward()


@lru_cache(maxsize=8)
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
