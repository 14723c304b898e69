"""What `huoyan.kernels.choose_rows.choose_rows` gives, apart; here without Triton, which a CPU may lack."""

from __future__ import annotations

import torch
from torch import Tensor


def ids_and_logprobs(found: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [3 R] -> int64 [R], float32 [R], which share its memory."""
    rows = len(found) // 3
    return found[: 2 * rows].view(torch.int64), found[2 * rows :].view(torch.float32)
