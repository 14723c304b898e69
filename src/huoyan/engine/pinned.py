"""Integers that the host writes down for a step and the device reads by itself, some time later."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class PinnedIntegers:
    """int32 arrays of the host, pinned where a CUDA device is to read them: as tensors, and as what is written to."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        pin = device.type == "cuda"
        self.tensors = tuple(torch.zeros(shape, dtype=torch.int32, pin_memory=pin) for shape in shapes)
        self.arrays = tuple(tensor.numpy() for tensor in self.tensors)
        self._read = torch.cuda.Event() if pin else None

    def mark(self) -> None:
        """The device will have read them when it has done what it was told so far."""
        if self._read is not None:
            self._read.record()

    def wait(self) -> None:
        """Until they may be written over."""
        if self._read is not None:
            self._read.synchronize()
