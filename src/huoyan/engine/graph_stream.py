"""Where CUDA graphs of steps are captured."""

from __future__ import annotations

from functools import lru_cache

import torch


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that steps run on, since cuBLAS keeps 32 MiB for every one that it has seen; on the default stream,
    where nothing can be captured, one for all."""
    current = torch.cuda.current_stream(device)
    return _aside(device) if current == torch.cuda.default_stream(device) else current


@lru_cache(maxsize=8)
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
