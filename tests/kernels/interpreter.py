"""What Triton's interpreter cannot do."""

from __future__ import annotations

import pytest
import torch


def skip_bfloat16_products(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices, not their values")
