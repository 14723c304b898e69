"""Torch's CUDA allocator in segments that grow, where nobody has configured it otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from huoyan.planning.allocator import GROWING, grows

if TYPE_CHECKING:
    import torch


def let_segments_grow(device: torch.device) -> None:
    """Call it before weights are loaded: what was allocated before stays in segments of fixed sizes.

    Weights of odd sizes leave gaps in those, and so do the changing sizes of a step's tensors.
    """
    import torch

    if device.type == "cuda" and grows():
        torch._C._accelerator_setAllocatorSettings(GROWING)
