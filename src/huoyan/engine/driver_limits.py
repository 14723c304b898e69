"""What the CUDA driver and cuBLAS set aside for themselves, made smaller: see `huoyan.planning`."""

from __future__ import annotations

import ctypes
import logging
import os
from typing import TYPE_CHECKING

from huoyan.planning.driver import DRIVER_STACK_BYTES, stack_limit
from huoyan.planning.memory import CUBLAS_OURS, CUBLAS_TORCHS, CUBLAS_VARIABLE

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_STACK_SIZE = 0
"""CU_LIMIT_STACK_SIZE"""


def limit_cublas(device: torch.device) -> None:
    """Let cuBLAS have less memory for each stream, where nobody has said how much. Torch reads the variable when it
    multiplies for the first time, so where CUDA is in use already it says what there is, for the plan to count with."""
    import torch

    if device.type == "cuda" and not os.environ.get(CUBLAS_VARIABLE):
        os.environ[CUBLAS_VARIABLE] = CUBLAS_TORCHS if torch.cuda.is_initialized() else CUBLAS_OURS


def lower_stack_limit(device: torch.device) -> None:
    """Give back what the context on `device` sets aside for stacks.

    Call it before anything large is allocated. A limit that somebody has set already stays, and so does the driver's
    where it refuses.
    """
    import torch

    wanted = stack_limit()
    if device.type != "cuda" or wanted is None:
        return
    try:
        with torch.cuda.device(device):
            # Makes the context.
            torch.cuda.synchronize()
            if _limit() == DRIVER_STACK_BYTES:
                _driver().cuCtxSetLimit(_STACK_SIZE, ctypes.c_size_t(wanted))
    except (OSError, AttributeError) as error:
        log.debug("the stack limit stays: %s", error)


def stack_limit_is_low(device: torch.device) -> bool:
    """Whether the context on `device` sets less aside than it would by itself."""
    import torch

    try:
        with torch.cuda.device(device):
            return 0 <= _limit() < DRIVER_STACK_BYTES
    except (OSError, AttributeError):
        return False


def _limit() -> int:
    """Of the current context; -1 where the driver does not say."""
    found = ctypes.c_size_t()
    return -1 if _driver().cuCtxGetLimit(ctypes.byref(found), _STACK_SIZE) else found.value


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "windll") else "libcuda.so.1")
