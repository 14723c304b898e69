"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits inside, once it has done
what does not depend on it. On Hopper and later; elsewhere the kernels run one after the other as always.

Every kernel that is launched so must call `wait` before it reads or writes what another kernel of the stream does.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@lru_cache(maxsize=1)
def overlaps() -> bool:
    """Whether kernels on the current device may be launched so."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def launch_options(overlap: bool) -> dict[str, bool]:
    """What the launch of a kernel takes besides its own arguments."""
    return {"launch_pdl": True} if overlap else {}


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Let the next kernel of the stream start; the first thing a kernel does."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until all that was launched before is done and can be read."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def prefetch_lines(pointers):
    """Have the 128-byte lines at `pointers` brought to the L2 cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
