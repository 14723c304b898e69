"""Encoded pictures by content, bounded in bytes: the same picture is encoded once."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from huoyan.engine.picture_encoder import Ready


class PictureCache:
    """Least recently used goes first; what a request still has to read is pinned and stays.

    The scheduler reserves room and pins before the runner encodes, so that the bytes are known beforehand.
    """

    def __init__(self, capacity_bytes: int, bytes_per_slice: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.bytes_per_slice = bytes_per_slice
        self.used_bytes = 0
        self.hits = 0
        self.misses = 0
        self._bytes: OrderedDict[bytes, int] = OrderedDict()
        self._pins: dict[bytes, int] = {}
        self._embeddings: dict[bytes, Tensor] = {}
        self._ready: dict[bytes, Ready] = {}
        """What to wait for before the embeddings are read, where they come from another stream."""

    def __contains__(self, key: bytes) -> bool:
        """Encoded, or reserved for a picture that is being encoded."""
        return key in self._bytes

    def __len__(self) -> int:
        return len(self._bytes)

    def reserve(self, key: bytes, num_slices: int, force: bool = False, own: Collection[bytes] = ()) -> bool:
        """Make room for a picture that is not here; False where pinned pictures leave too little.

        With `force` the capacity is exceeded where waiting for others would not help: by a picture that is
        larger than all of it, and where nobody pins pictures but the asker, whose pins are `own`.
        """
        wanted = num_slices * self.bytes_per_slice
        evictable = sum(size for k, size in self._bytes.items() if k not in self._pins)
        if self.used_bytes - evictable + wanted > self.capacity_bytes:
            others = any(key not in own or count > 1 for key, count in self._pins.items())
            if not force or (others and wanted <= self.capacity_bytes):
                return False
        self._evict(self.capacity_bytes - wanted)
        self._bytes[key] = wanted
        self.used_bytes += wanted
        self.misses += 1
        return True

    def pin(self, key: bytes) -> None:
        self._pins[key] = self._pins.get(key, 0) + 1
        self._bytes.move_to_end(key)

    def unpin(self, key: bytes) -> None:
        count = self._pins[key] - 1
        if count:
            self._pins[key] = count
            return
        del self._pins[key]
        if key in self._bytes and key not in self._embeddings:
            # Reserved, and the last reader left before it was encoded.
            self.drop(key)
        self._evict(self.capacity_bytes)

    def put(self, key: bytes, embeddings: Tensor, ready: Ready | None = None) -> None:
        """Store `embeddings: [num_slices, query_num, hidden]` for a reserved key; late ones are ignored."""
        if key in self._bytes:
            self._embeddings[key] = embeddings
            if ready is not None:
                self._ready[key] = ready

    def get(self, key: bytes) -> Tensor:
        """The embeddings [num_slices, query_num, hidden] of a picture that was put, for work on the current stream,
        which waits for them. Raises KeyError."""
        ready = self._ready.pop(key, None)
        if ready is not None:
            ready.wait()
        return self._embeddings[key]

    def is_ready(self, key: bytes) -> bool:
        """Whether reading a picture's embeddings would not wait for the encoder."""
        ready = self._ready.get(key)
        return key in self._embeddings and (ready is None or ready.query())

    @property
    def encoding(self) -> bool:
        """Whether the encoder is still at work on pictures that were put."""
        return any(not ready.query() for ready in self._ready.values())

    def drop(self, key: bytes) -> None:
        """Give up a reservation (the picture could not be encoded)."""
        size = self._bytes.pop(key, None)
        if size is not None:
            self.used_bytes -= size
        self._embeddings.pop(key, None)
        self._ready.pop(key, None)

    def clear(self) -> None:
        """Forget every picture that nobody is reading."""
        self._evict(0)

    def check(self, pinned: dict[bytes, int]) -> None:
        """Hold the books against the pins of all live requests. Raises AssertionError."""
        assert self._pins == pinned, f"pins {self._pins} but readers {pinned}"
        assert self.used_bytes == sum(self._bytes.values())
        assert set(self._embeddings) <= set(self._bytes)
        assert set(self._ready) <= set(self._embeddings)

    def _evict(self, down_to: int) -> None:
        if self.used_bytes <= down_to:
            return
        for key in [k for k in self._bytes if k not in self._pins]:
            self.drop(key)
            if self.used_bytes <= down_to:
                return
