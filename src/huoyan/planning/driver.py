"""What the CUDA driver takes of a card beside torch's allocator: the context, and the threads' stacks in it.

The driver sets the stack limit aside for every thread that the card can run at once. A kernel's own frame is known to
it, and it makes room for a larger one when that kernel is launched; only recursion, and calls of functions that are
not known before, need the limit. None of our kernels or torch's that we call has those.
"""

from __future__ import annotations

import os

from huoyan.planning.sizes import MIB

CUDA_CONTEXT = 692 * MIB
"""The driver's context with the kernels that get loaded, cuBLAS among them, and with the stacks that it begins with. An
H100 with torch of CUDA 13 had 615 MiB of it before the first weight was there, and with the stacks below 547 to 559
after every kind of load and 42 graphs; the plan of all that has 12 MiB more. A smaller GPU has less."""
STACK_BYTES = 256
"""The stack limit that an engine sets."""
DRIVER_STACK_BYTES = 1024
"""The one that a context begins with."""
STACKS_GIVEN_BACK = 162 * MIB
"""What the lower limit gives back on an H100 or H200, which run 132 * 2048 threads at once: 198 MiB, of which torch's
flash attention takes 36 again (384 bytes a thread)."""
GRAPH_DRIVER = MIB
"""What the driver keeps of one captured step: 0.4 to 1 MiB of graphs of 280 and 560 kernels, as long as they share a
pool."""
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
