"""The resampler's position embeddings by lookup: one gather however many different grids a batch has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from huoyan.models.patches import Grid
from huoyan.models.resampler import sincos_positions

_SIDE = 70


class LookedUpPositions:
    """Stands in for `huoyan.models.resampler.GridPositions` while training; gives the same values."""

    def __init__(self, width: int) -> None:
        axis = sincos_positions(_SIDE, width // 2)
        columns = axis.expand(_SIDE, -1, -1)
        rows = axis.unsqueeze(1).expand(-1, _SIDE, -1)
        self.table = torch.cat((columns, rows), dim=-1).flatten(0, 1)
        self.moved: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.index: dict[Grid, NDArray[np.int64]] = {}

    def __call__(self, grids: Sequence[Grid], device: torch.device, dtype: torch.dtype) -> Tensor:
        """[sum(rows * columns), width]."""
        key = (device, dtype)
        if key not in self.moved:
            self.moved[key] = self.table.to(device, dtype)
        for rows, columns in grids:
            if (rows, columns) not in self.index:
                if max(rows, columns) > _SIDE:
                    raise ValueError(f"a grid of {rows} by {columns} patches is longer than {_SIDE}")
                self.index[rows, columns] = (np.arange(rows)[:, None] * _SIDE + np.arange(columns)).ravel()
        index = torch.from_numpy(np.concatenate([self.index[grid] for grid in grids]))
        return self.moved[key].index_select(0, index.to(device, non_blocking=True))
