"""Rotary position embedding in the half-split ("NeoX") form that Qwen2 uses."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """cos and sin of every position, in float32, made once for each device.

    `lookup(positions [T])` gives (cos, sin), each [T, 1, head_dim / 2], to share by all layers of a step.
    """

    def __init__(self, head_dim: int, theta: float, max_positions: int) -> None:
        self.head_dim = head_dim
        self.theta = theta
        self.max_positions = max_positions
        self._tables: dict[torch.device, Tensor] = {}

    def table(self, device: torch.device) -> Tensor:
        """[max_positions, 2, head_dim / 2]: cosines, then sines."""
        found = self._tables.get(device)
        if found is None:
            half = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
            frequencies = 1.0 / (self.theta**half)
            angles = torch.outer(torch.arange(self.max_positions, dtype=torch.float32), frequencies)
            found = torch.stack((angles.cos(), angles.sin()), dim=1).to(device)
            self._tables[device] = found
        return found

    def lookup(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.table(positions.device).index_select(0, positions)
        return rows[:, 0].unsqueeze(1), rows[:, 1].unsqueeze(1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, head_dim] by (cos, sin) [T, 1, head_dim / 2]; computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
