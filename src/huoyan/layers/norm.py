"""Normalisations, computed in float32 inside, as torch's fused operators do."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's layer norm; here so that the model names one place for its normalisations."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)
