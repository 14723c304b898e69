"""The kernels of beam searches against plain PyTorch, on fresh random inputs, many of them equal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from huoyan.engine.device_beams import WIDEST_ON_TRIAL
from huoyan.kernels.beam_advance import beam_advance, fits
from huoyan.kernels.beam_candidates import CHUNK, beam_candidates, beam_candidates_reference
from huoyan.kernels.beam_move import beam_move
from huoyan.kernels.copy_blocks import copy_blocks, copy_blocks_reference
from huoyan.layers.beam_step import FACTS, advance, move_rows, room_for_found
from tests.sampling.beam_cases import random_found, random_orders


def coarse(g: torch.Generator, *shape: int) -> Tensor:
    """Floats of which many are equal, some of them zeros of either sign."""
    return torch.randn(shape, generator=g).mul(4).round().div(4)


@pytest.mark.parametrize("vocab, count", [(7, 4), (89, 6), (CHUNK, 5), (3 * CHUNK + 17, 16)])
def test_candidates(seed: int, device: torch.device, vocab: int, count: int) -> None:
    g = torch.Generator().manual_seed(seed)
    wide = coarse(g, 9, vocab + 3)
    wide[3, :vocab] += torch.randn(vocab, generator=g)
    wide[4, ::2] = -math.inf
    wide[5] *= 40
    logits = wide[:, :vocab].to(device)
    rows = torch.randperm(9, generator=g)[:8].view(2, 4)
    rows[0, 3] = -1
    table = torch.cat((torch.zeros(2, 3, dtype=torch.int64), rows), 1).to(device)
    found = room_for_found(2, 4, count, device).fill_(-5)
    beam_candidates(logits, table[:, 3:], found, FACTS)
    assert (found[:, :, :FACTS] == -5).all(), "not its part"
    values, ids = beam_candidates_reference(logits, table[:, 3:], count)
    there = (rows >= 0).to(device)
    got = found[:, :, FACTS : FACTS + count], found[:, :, FACTS + count :].contiguous().view(torch.float32)
    assert torch.equal(got[0][there].long(), ids[there])
    torch.testing.assert_close(got[1][there], values[there], rtol=1e-5, atol=1e-5)
    assert (found[0, 3] == -5).all(), "a beam without a row"


@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_advance(seed: int, device: torch.device, width: int) -> None:
    """Several steps of several searches, decision for decision and bit for bit."""
    g = torch.Generator().manual_seed(seed)
    count = 2 * width
    assert fits(width, count)
    before = mine = None
    survived = over = 0
    for step in range(12):
        orders = random_orders(g, width, 5, step, device)
        found = random_found(g, width, 5, count, device)
        own = found.clone()
        before, mine = advance(orders, found, before), beam_advance(orders, own, mine)
        in_width = torch.arange(width, device=device) < orders.table[:, :1]
        assert torch.equal(found[in_width], own[in_width])
        assert torch.equal(before, mine)
        alive = (before[:, 0] > -math.inf).any(1)
        survived += int(alive.sum())
        over += int((~alive).sum())
    assert survived
    assert over


def test_too_many_candidates_to_hold_against_each_other() -> None:
    assert fits(WIDEST_ON_TRIAL - 1, 2 * WIDEST_ON_TRIAL - 2)
    assert not fits(WIDEST_ON_TRIAL, 2 * WIDEST_ON_TRIAL)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("in_one", [True, False])
def test_move(seed: int, device: torch.device, block_size: int, in_one: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    rows, width, columns = 11, 3, 700 // block_size
    found = random_found(g, width, 4, 6, device)
    orders = random_orders(g, width, 4, 0, device)
    advance(orders, found, None)
    lines = [
        (first + beam, search, beam, first)
        for search, first in ((2, 1), (0, 6))
        for beam in range(int(orders.table[search, 0]))
    ]
    moves = torch.tensor(lines, device=device)
    inputs = torch.randint(0, 5000, (rows, 4 + columns), generator=g).int()
    inputs[:, 1] = torch.randint(0, columns * block_size, (rows,), generator=g)
    for line in lines:
        inputs[line[0], 1] = inputs[line[3], 1]
    inputs = inputs.to(device)
    results = []
    for move in (move_rows, beam_move):
        whole = inputs.clone()
        # The columns of a graph's inputs, or tensors apart of other types.
        tokens, positions, slots, tables = (*whole[:, :3].unbind(1), whole[:, 4:])
        if not in_one:
            tokens, positions, slots = tokens.long(), positions.contiguous(), slots.contiguous()
            tables = tables.contiguous()
        copied = move(moves, found, block_size, tokens, positions, slots, tables)
        ends = (positions // block_size).tolist()
        results.append([tokens, slots, *copied, *(t[: e + 1] for t, e in zip(tables, ends, strict=True))])
    for plain, kernel in zip(*results, strict=True):
        assert torch.equal(plain, kernel)


@pytest.mark.parametrize(
    "dtype, shape",
    [(torch.float16, (3, 9, 16, 2, 64)), (torch.uint8, (2, 9, 4, 1, 72)), (torch.float16, (2, 9, 1, 1, 1))],
)
def test_copies(seed: int, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 200, shape, generator=g).to(dtype).to(device)
    sources = torch.tensor([4, 1, 4, 7], device=device)
    targets = torch.tensor([2, 1, 0, 7], device=device)
    plain = stored.clone()
    copy_blocks_reference(plain, sources, targets)
    copy_blocks(stored, sources, targets)
    assert torch.equal(stored, plain)
    assert torch.equal(stored[:, 2], stored[:, 4])
