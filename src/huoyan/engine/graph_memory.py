"""Memory that the CUDA graphs of one stream share, since only one of them runs at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from huoyan.planning.memory import exchanged_beside, exchanged_values

if TYPE_CHECKING:
    from huoyan.models.minicpmv import MiniCPMV


@dataclass(frozen=True)
class GraphMemory:
    """Of a step's stream (decodes, whole prompts, pictures where nothing decodes), or of pictures beside decodes."""

    pool: Any
    """Of `torch.cuda.graph_pool_handle`: what lives while a graph runs."""
    exchange: Tensor
    """Numbers of the model's dtype where prompts and pictures go in and come out. Whoever replays a graph reads what
    has come out before the next one is replayed."""

    @staticmethod
    def of(model: MiniCPMV, *, beside: bool = False) -> GraphMemory:
        values = exchanged_beside(model.config) if beside else exchanged_values(model.config)
        return GraphMemory(torch.cuda.graph_pool_handle(), model.resampler.query.new_zeros(values))
