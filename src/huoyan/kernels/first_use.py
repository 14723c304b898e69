"""What the first kernel of a process waits for, done while weights are read."""

from __future__ import annotations

import contextlib
import threading


def prepare() -> None:
    """Have a thread import Triton and read its files: what is compiled is known by them too, and they are many and
    large. Does nothing where there is no Triton."""
    threading.Thread(target=read_triton, name="huoyan-triton", daemon=True).start()


def read_triton() -> None:
    """What `prepare` has a thread do."""
    # Should it not be there, or fail, the first kernel does it, which tells why.
    with contextlib.suppress(Exception):
        from triton.runtime.cache import triton_key

        triton_key()
