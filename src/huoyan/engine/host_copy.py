"""Tensors on their way from the device to the host."""

from __future__ import annotations

from collections import deque
from threading import Lock

import torch
from torch import Tensor

_in_writing: deque[tuple[torch.cuda.Event, Tensor]] = deque()
_lock = Lock()


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

    @classmethod
    def written(cls, tensor: Tensor, device: torch.device) -> HostCopy:
        """What kernels ordered so far write into `tensor` themselves, on a CPU; pinned where `device` is CUDA."""
        found = cls()
        found._tensors = (tensor,)
        if device.type == "cuda":
            found._event = torch.cuda.Event()
            found._event.record()
            _hold(found._event, tensor)
        return found

    def read(self) -> tuple[Tensor, ...]:
        """The tensors, on a CPU where they come from CUDA."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _hold(event: torch.cuda.Event, tensor: Tensor) -> None:
    """Keep `tensor` until the event: torch knows which copies go on in pinned memory, but of no kernel that writes
    there, and would give the memory away when nobody reads what comes, as of a request that was aborted."""
    with _lock:
        while _in_writing and _in_writing[0][0].query():
            _in_writing.popleft()
        _in_writing.append((event, tensor))
