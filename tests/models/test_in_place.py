"""What is written over where nothing is differentiated is what it would be beside."""

from __future__ import annotations

import contextlib

import pytest
import torch

from huoyan.engine import segments
from huoyan.layers import blocks
from huoyan.models import resampler
from huoyan.planning.pieces import mlp_rows, up_columns
from tests.models.small import small_model
from tests.models.test_forward import causal


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


@torch.inference_mode()
def test_a_decoder_writes_over_what_it_was_given(seed: int) -> None:
    """As graphs of steps have it; int32 as theirs are."""
    model = small_model(seed)
    ids = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(seed)).int()
    x, positions = model.embed(ids), torch.arange(9, dtype=torch.int32)
    assert torch.equal(x, model.embed(ids.long()))
    want = model.decoder(x, positions, causal)
    assert model.decoder(x, positions, causal, out=x) is x
    assert torch.equal(x, want)


@pytest.mark.parametrize(("rows", "some"), [(7, 3), (9, 3), (5, 8)])
def test_an_mlp_in_pieces(rows: int, some: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways of a GPU with many tokens, some rows at a time, beside the plain way."""
    monkeypatch.setattr(blocks, "dense_rows", lambda out, width, kernels: 16)
    torch.manual_seed(seed)
    x, matrix, down = (torch.randn(size).double() for size in ((rows, 24), (2 * 40, 24), (24, 40)))
    gate, up = (x @ matrix.T).chunk(2, 1)
    want = torch.nn.functional.silu(gate) * up
    found = blocks.gated_by_blocks(x, 40, lambda start, stop: matrix[start:stop], some)
    torch.testing.assert_close(found, want)

    def whole(part: torch.Tensor) -> torch.Tensor:
        gate, up = (part @ matrix.T).chunk(2, 1)
        return (torch.nn.functional.silu(gate) * up) @ down.T

    def over(part: torch.Tensor) -> torch.Tensor:
        return part.copy_(whole(part))

    for compute in (whole, over):
        given = x.clone()
        assert blocks.over_rows(compute, given, some) is given
        torch.testing.assert_close(given, whole(x))
    place = torch.empty(rows, 80).double()
    torch.testing.assert_close(
        blocks.linear_by_blocks(x, 80, lambda start, stop: matrix[start:stop], out=place), x @ matrix.T
    )
    torch.testing.assert_close(place, x @ matrix.T)


def test_the_pieces_of_an_mlp() -> None:
    assert [mlp_rows(n) for n in (1, 1024, 1025, 2048, 2050)] == [1, 1024, 640, 1024, 768]
    assert [up_columns(n, 18944) for n in (1, 221, 222, 512, 1024, 2048)] == [
        18944,
        18944,
        9472,
        6400,
        3840,
        1920,
    ]
    assert up_columns(10**6, 100) == 100


def test_tensors_laid_elsewhere_are_what_they_were(seed: int) -> None:
    """A weight and its view go along, and memory is given back now and then."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(5, 7).requires_grad_(False)
    model.register_buffer("part", model.weight.data[:3])
    model.register_buffer("nothing", torch.empty(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    segments.lay_side_by_side(model, contextlib.nullcontext, lambda: None)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.part.data_ptr() == model.weight.data_ptr()
    segments.close_gaps(model, torch.device("cpu"))
