"""Which pictures wait as they are for the encoder's device to resize them, and how much memory that may take."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

from huoyan.media.bicubic import bicubic_table
from huoyan.media.types import PreparedPicture, SlicePlan
from huoyan.planning.pieces import BESIDE_PIXELS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MIB = 1 << 20
LARGEST = BESIDE_PIXELS
"""Bytes of one original at most, 14 million pixels; a larger one is resized on the host. It bounds an upload too."""
EXCESS = 256 * MIB
"""Bytes that all waiting originals may take beyond what their slices would."""


class Originals:
    """Keeps a picture as it is while the waiting ones together take hardly more memory than their slices would.

    A picture that is smaller than its slices is always kept; of a larger one the excess counts, until nobody holds
    what `keep` gave. Which way a picture goes changes no byte of what the encoder sees. Called from several threads.
    """

    def __init__(self, largest: int = LARGEST, excess: int = EXCESS) -> None:
        self._largest = largest
        self._room = excess
        self._lock = threading.Lock()
        # A finalizer may run anywhere, in the thread that holds the lock too; appending is safe there.
        self._returned: deque[int] = deque()

    def keep(self, key: bytes, plan: SlicePlan, pixels: NDArray[np.uint8]) -> PreparedPicture | None:
        """The picture as it is, or None where it is to be cut here. `pixels`: uint8 [height, width, 3]."""
        if pixels.nbytes > self._largest:
            return None
        excess = max(pixels.nbytes - 3 * plan.num_pixels, 0)
        if excess and not self._take(excess):
            return None
        prepared = PreparedPicture(key, plan, original=pixels)
        if excess:
            weakref.finalize(prepared, self._returned.append, excess).atexit = False
        _make_tables((pixels.shape[1], pixels.shape[0]), plan)
        return prepared

    def _take(self, excess: int) -> bool:
        with self._lock:
            while self._returned:
                self._room += self._returned.popleft()
            if excess > self._room:
                return False
            self._room -= excess
        return True


def _make_tables(size: tuple[int, int], plan: SlicePlan) -> None:
    """Here, in a thread beside the engine's, which then finds them."""
    sizes = [plan.overview]
    if plan.cell is not None and plan.grid is not None:
        sizes.append((plan.cell[0] * plan.grid[0], plan.cell[1] * plan.grid[1]))
    for new in sizes:
        for side_in, side_out in zip(size, new, strict=True):
            bicubic_table(side_in, side_out)
