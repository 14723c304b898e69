"""Uploads through pinned memory of a bounded size, which the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Staging:
    """A ring of pinned bytes. Pinning is slow, so it is done once, and again only for an upload that is larger.

    The host waits only where the ring comes round to bytes that the device has not read yet.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._device = device
        self._size = size
        self._ring: Tensor | None = None
        self._at = 0
        self._read: list[tuple[int, int, torch.cuda.Event]] = []
        """Parts (from, to) of the ring, oldest first, and what tells that they were read."""

    def upload(self, arrays: Sequence[NDArray[np.uint8]]) -> Tensor:
        """The bytes of contiguous arrays, end to end: uint8 [bytes] on the device, in one copy on this stream."""
        wanted = sum(array.nbytes for array in arrays)
        room = self._room(wanted)
        into, at = room.numpy(), 0
        for array in arrays:
            into[at : at + array.nbytes] = array.reshape(-1)
            at += array.nbytes
        if self._device.type != "cuda":
            return room.to(self._device, copy=True)
        out = room.to(self._device, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._read.append((self._at - wanted, self._at, event))
        return out

    def _room(self, wanted: int) -> Tensor:
        if self._ring is None or wanted > self._ring.numel():
            for *_, event in self._read:
                event.synchronize()
            self._read.clear()
            size = max(self._size, wanted)
            self._ring = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._at = 0
        if self._at + wanted > self._ring.numel():
            self._at = 0
        first, last = self._at, self._at + wanted
        # Copies end in their order, so what overlaps is waited for with all before it.
        overlapping = [i for i, (a, b, _) in enumerate(self._read) if a < last and first < b]
        if overlapping:
            self._read[overlapping[-1]][2].synchronize()
            del self._read[: overlapping[-1] + 1]
        self._at = last
        return self._ring[first:last]
