"""What the CUDA driver takes of a card beside torch's allocator: the context, and the threads' stacks in it.

The driver sets the stack limit aside for every thread that the card can run at once. A kernel's own frame is known to
it, and it makes room for a larger one when that kernel is launched; only recursion, and calls of functions that are
not known before, need the limit. None of our kernels or torch's that we call has those.
"""

from __future__ import annotations

import os

from huoyan.planning.sizes import MIB

CUDA_CONTEXT = 704 * MIB
"""The driver's context with the kernels that get loaded, and with the stacks that it begins with. An H200 with torch
of CUDA 13 had 615 MiB of it before the first weight was there and 753 after a first answer, a few graphs included; a
smaller GPU has less."""
STACK_BYTES = 256
"""The stack limit that an engine sets."""
DRIVER_STACK_BYTES = 1024
"""The one that a context begins with."""
STACKS_GIVEN_BACK = 0
"""What the lower limit is counted to give back. On an H200, which runs 132 * 2048 threads at once, 198 MiB should be,
less what the largest frame of a kernel takes again: to be measured."""
GRAPH_DRIVER = 4 * MIB
"""What the driver keeps of one captured decode step, an estimate."""
STACK_VARIABLE = "HUOYAN_CUDA_STACK"


def context_bytes(lowered: bool | None = None) -> int:
    """The context of a process; `lowered`: whether its stack limit is, None: whether it is to be."""
    if lowered is None:
        lowered = stack_limit() is not None
    return CUDA_CONTEXT - (STACKS_GIVEN_BACK if lowered else 0)


def stack_limit() -> int | None:
    """Bytes a thread, of the user's variable or our own; None where the driver's is to stay."""
    said = os.environ.get(STACK_VARIABLE, "")
    if not said:
        return STACK_BYTES
    return int(said) if said.isdigit() and int(said) <= STACK_BYTES else None
