"""What this machine's processor does by itself."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiplies_bfloat16() -> bool:
    """Whether it multiplies bfloat16, and torch knows how to make it."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return known is not None and bool(known()) and torch.backends.mkldnn.is_available()
