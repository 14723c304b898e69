"""Ctrl-C ends a call, not the engine: vLLM's processes are started so that they do not hear it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def children_ignore_ctrl_c() -> Iterator[None]:
    """Processes that are started inside inherit a blocked SIGINT; vLLM's would otherwise end with the terminal's.

    This process still hears it: a thread that does not block it takes it, and Python raises KeyboardInterrupt
    in the main thread as ever.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    # It unblocks SIGINT where it starts, which would be in the midst of starting vLLM's first process.
    resource_tracker.ensure_running()
    done = threading.Event()
    threading.Thread(target=done.wait, name="huoyan-vllm-signals", daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()
