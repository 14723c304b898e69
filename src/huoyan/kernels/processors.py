"""What a device has, for cuts of products."""

from __future__ import annotations

from functools import lru_cache

import torch

PUBLISHED = 132
"""Processors of an H100 or H200, for which cuts were searched."""


@lru_cache(maxsize=16)
def processors(device: torch.device, elsewhere: int = PUBLISHED) -> int:
    """Of a CUDA device; `elsewhere` of others, which only tests ask for."""
    if device.type != "cuda":
        return elsewhere
    return torch.cuda.get_device_properties(device).multi_processor_count
