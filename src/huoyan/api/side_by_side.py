"""Several pictures of one request opened side by side: decoding files is most of what comes before the encoder, and
Pillow does it outside the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from huoyan.api.inline import Inline

T = TypeVar("T")
MOST = 8
"""Threads, of all requests together."""


def open_each(sources: Sequence[Any], load: Callable[[Any], T]) -> list[T]:
    """load(source) of every source, in their order; an object that is there twice is opened once.

    What reads from where a file object stands happens in the calling thread, one after the other. Raises what the
    first source that fails, in their order, has raised.
    """
    if len(sources) < 2:
        return [load(source) for source in sources]
    opened: dict[int, Future[T]] = {}
    for source in sources:
        if id(source) not in opened:
            executor = Inline() if hasattr(source, "read") else _pool()
            opened[id(source)] = executor.submit(load, source)
    return [opened[id(source)].result() for source in sources]


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST, os.cpu_count() or 1), thread_name_prefix="huoyan-open")
