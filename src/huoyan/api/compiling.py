"""Whether a start has kernels to compile, told before anything that takes time is done, and who compiles them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huoyan.cores import usable_cores
from huoyan.kernels import decode_kernels_enabled
from huoyan.version import __version__

if TYPE_CHECKING:
    from huoyan.api.options import EngineOptions
    from huoyan.kernels.compile_helper import CompileHelper

log = logging.getLogger(__name__)

_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
"""One is there where a CUDA driver is, the other in the Linux of Windows."""
_LEAST_CORES = 4
"""With fewer, importing it all once more takes what compiling side by side would give."""


@contextmanager
def helper_for(options: EngineOptions, folder: Path) -> Iterator[CompileHelper | None]:
    """Start a helper where this start may have kernels to compile: where none like it came to its end before. It is
    ended with the block."""
    mark = _mark(options, folder) if _may_compile(options) else None
    # A place that may not be looked at is one where nothing was compiled.
    helper = None if mark is None or os.path.exists(mark) else _started()
    if mark is None or helper is None:
        yield None
        return
    try:
        yield helper
    finally:
        helper.close()
    with contextlib.suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _started() -> CompileHelper | None:
    from huoyan.kernels.compile_helper import CompileHelper

    try:
        return CompileHelper()
    except OSError as error:
        log.debug("there is no process to compile kernels: %s", error)
        return None


def _may_compile(options: EngineOptions) -> bool:
    captures = options.capture_at_start and not options.enforce_eager and options.backend == "native"
    if not captures or options.device.partition(":")[0] not in ("auto", "cuda"):
        return False
    # Who has Python inside, or is one file with it, may have no command that is Python.
    if not sys.executable or getattr(sys, "frozen", False):
        return False
    return decode_kernels_enabled() and any(map(os.path.exists, _DEVICES)) and usable_cores() >= _LEAST_CORES


def _mark(options: EngineOptions, folder: Path) -> Path:
    """A file beside what Triton keeps, which goes where that goes."""
    # As Triton finds it, which asks for no home that is known to the system.
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    kept = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    seen = [
        __version__,
        options.dtype,
        options.kv_cache_dtype,
        options.max_num_seqs,
        options.max_num_batched_tokens,
    ]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        seen.append(importlib.metadata.version("triton"))
    with contextlib.suppress(OSError):
        seen.append((folder / "config.json").read_text(encoding="utf-8", errors="replace"))
    return Path(kept) / f"huoyan-{hashlib.sha256(repr(seen).encode()).hexdigest()[:32]}"
