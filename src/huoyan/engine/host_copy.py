"""Tensors on their way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copies that were ordered behind the work so far and are read later.

    Reading waits for that work alone, not for what was launched after it.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors and tensors[0].device.type == "cuda":
            self._tensors = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            )
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tensors = tensors

    def read(self) -> tuple[Tensor, ...]:
        """The tensors, on a CPU where they come from CUDA."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
