from __future__ import annotations

import pytest
import torch
from torch import nn

from huoyan.engine.sizing import tensor_bytes
from huoyan.layers.cpu import multiplies_bfloat16
from huoyan.layers.linear import Linear, lay_out_for_cpu
from tests.models.small import small_model


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


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor does not multiply bfloat16")
def test_bfloat16_is_stored_once_in_another_order(seed: int) -> None:
    torch.manual_seed(seed)
    layers = [Linear(24, (40, 8), bias=True), Linear(48, (25,), bias=False), Linear(320, (7, 130), bias=True)]
    tied, embedding = Linear(16, (64,), bias=False), nn.Embedding(64, 16)
    tied.weight = embedding.weight
    model = nn.ModuleList([*layers, tied, embedding]).bfloat16().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    dense = [(layer.weight.float(), layer.bias) for layer in layers]
    lay_out_for_cpu(model)
    lay_out_for_cpu(model)
    assert tied.reordered is None
    assert tied.weight is embedding.weight
    for layer, (weight, bias) in zip(layers, dense, strict=True):
        assert layer.weight.numel() == 0, "a second copy"
        for shape in ((1,), (3,), (2, 5), (200,)):
            x = torch.randn(*shape, layer.width_in).bfloat16()
            want = nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
            assert layer(x).dtype is torch.bfloat16
            torch.testing.assert_close(layer(x).float(), want, rtol=1e-2, atol=0.1)
            torch.testing.assert_close(layer.in_float32(x), layer(x).float())
        # Columns of something wider, as a part of a stacked product is.
        x = torch.randn(4, 2 * layer.width_in).bfloat16()[:, ::2]
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_all_tensors_are_counted_in_either_order(seed: int) -> None:
    model = small_model(seed).to(torch.bfloat16)
    before = tensor_bytes(model)
    lay_out_for_cpu(model)
    assert tensor_bytes(model) == before
