"""Linear maps. A layer may hold several of the checkpoint's matrices stacked along their outputs."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """x [..., in] @ weight [out, in].T + bias [out].

    `splits` are the output widths of the checkpoint's own matrices that are stacked in this one.
    """

    def __init__(self, width_in: int, splits: tuple[int, ...], *, bias: bool) -> None:
        super().__init__()
        self.width_in = width_in
        self.splits = splits
        self.weight = nn.Parameter(torch.empty(sum(splits), width_in))
        self.bias = nn.Parameter(torch.empty(sum(splits))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def lay_out_for_cpu(model: nn.Module) -> None:
    """Store wide float32 weights on a CPU input by input; shapes and results stay as they are.

    MKL multiplies a few rows with `[in, out]` in memory up to three times as fast as with `[out, in]` where
    there are more outputs than inputs. Weights that another module shares are left alone.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for layer in layers:
        weight = layer.weight
        wide = weight.shape[0] > weight.shape[1] and weight.dtype is torch.float32
        if wide and weight.device.type == "cpu" and shared[id(weight)] == 1:
            weight.data = weight.data.t().contiguous().t()
