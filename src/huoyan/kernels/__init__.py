"""Triton kernels, each with its plain PyTorch reference beside it.

CUDA uses them unless HUOYAN_CUDA_KERNELS=0 asks for the plain path, which is for finding out where a fault lies.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec


def decode_kernels_enabled() -> bool:
    """Whether CUDA uses our attention, rotation, matrix and graph kernels."""
    return os.environ.get("HUOYAN_CUDA_KERNELS", "1") not in ("", "0") and _has_triton()


def picture_kernels_enabled() -> bool:
    """Whether CUDA resizes pictures, runs the encoder on a stream of its own, and captures it in graphs."""
    return decode_kernels_enabled()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    """torch's builds for CUDA bring it along on Linux; elsewhere there may be none."""
    return find_spec("triton") is not None
