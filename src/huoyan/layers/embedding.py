"""A table of embeddings whose rows are filled later."""

from __future__ import annotations

import torch
from torch import nn


def embedding(rows: int, width: int) -> nn.Embedding:
    """`nn.Embedding` without its initialisation.

    On the meta device, where models are built before their weights are read, that initialisation would import
    torch's compiler: 1.7 s of a cold start.
    """
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))
