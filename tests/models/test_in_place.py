"""What is written over where nothing is differentiated is what it would be beside."""

from __future__ import annotations

import pytest
import torch

from huoyan.models import resampler


@pytest.mark.parametrize("rows", [3, 8, 9, 25])
def test_projecting_over_what_is_projected(rows: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampler, "PROJECTED_PATCHES", 8)
    torch.manual_seed(seed)
    attention = resampler.CrossAttention(16, 2)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(rows, 16)
    with torch.no_grad():
        want = attention.project(1, x)
        given = x.clone()
        torch.testing.assert_close(attention.project(1, given, over=True), want)
    assert torch.equal(given, x) == (rows <= 8)
    given = x.clone()
    torch.testing.assert_close(attention.project(1, given, over=True), want)
    assert torch.equal(given, x), "gradients need it"
