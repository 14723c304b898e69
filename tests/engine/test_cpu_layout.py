from __future__ import annotations

import torch
from torch import nn

from huoyan.layers.linear import Linear, lay_out_for_cpu


def test_layout_changes_strides_and_nothing_else(seed: int) -> None:
    torch.manual_seed(seed)
    wide, narrow, tied = (
        Linear(24, (40, 8), bias=True),
        Linear(48, (24,), bias=False),
        Linear(16, (64,), bias=False),
    )
    embedding = nn.Embedding(64, 16)
    tied.weight = embedding.weight
    model = nn.ModuleList([wide, narrow, tied, embedding])
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(5, 24)
    want = wide(x)
    lay_out_for_cpu(model)
    torch.testing.assert_close(wide(x), want)
    assert wide.weight.t().is_contiguous()
    assert narrow.weight.is_contiguous()
    assert tied.weight is embedding.weight
    assert tied.weight.is_contiguous(), "an embedding is read row by row"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lay_out_for_cpu(model)
    assert wide.weight.t().is_contiguous()
