"""Triton kernels, each with its plain PyTorch reference beside it.

The kernels of a decode step, of int4 products and of pictures are tested in Triton's interpreter but have not yet been
run on a GPU, so a GPU runs the plain path unless HUOYAN_CUDA_KERNELS=1 asks for them (as `make test-gpu` does).
"""

from __future__ import annotations

import os


def decode_kernels_enabled() -> bool:
    """Whether CUDA uses our attention, rotation, graph and int4 kernels."""
    return os.environ.get("HUOYAN_CUDA_KERNELS", "0") not in ("", "0")


def picture_kernels_enabled() -> bool:
    """Whether CUDA resizes pictures, runs the encoder on a stream of its own, and captures it in graphs."""
    return decode_kernels_enabled()
