"""A decode step's inputs, filled in by our kernel, against plain PyTorch, on fresh random steps."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from huoyan.kernels.fill_inputs import SOURCE, TILE, fill_inputs, fill_inputs_reference


@pytest.mark.parametrize("late", ["none", "in order", "scattered"])
@pytest.mark.parametrize("most_blocks", [5, TILE + 9])
def test_rows_are_those_of_the_step(seed: int, device: torch.device, late: str, most_blocks: int) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, pitch = 9, 32

    def numbers(*shape: int) -> Tensor:
        return torch.randint(1 << 30, shape, generator=g, dtype=torch.int32)

    before = numbers(4, pitch), numbers(rows, most_blocks)
    found, expected = ([t.to(device, copy=True) for t in before] for _ in range(2))
    for size in (rows, rng.randint(1, rows), 1):
        for count in (size, rng.randint(0, size)):
            host = numbers(SOURCE + 1, pitch), numbers(rows, most_blocks)
            ids = torch.randint(1 << 17, (count + 2,), generator=g)
            if late == "scattered":
                sources = torch.tensor(rng.sample(range(-1, count + 1), count), dtype=torch.int32)
            else:
                sources = torch.arange(count) if late == "in order" else torch.full((count,), -1)
            host[0][SOURCE, :count] = sources
            where = [t.pin_memory() if device.type == "cuda" else t for t in host]
            blocks = rng.randint(0, most_blocks)
            for fill, into in ((fill_inputs, found), (fill_inputs_reference, expected)):
                given = where if fill is fill_inputs else [t.to(device) for t in host]
                fill(*given, ids.to(device), *into, size, count, blocks)
            assert all(map(torch.equal, found, expected))
    # Beyond the rows and blocks of steps nothing is touched.
    assert torch.equal(found[0][:, rows:].cpu(), before[0][:, rows:])


def test_tokens_of_rows_without_a_step_stay(device: torch.device) -> None:
    numbers = torch.full((4, 32), 7, dtype=torch.int32, device=device)
    tables = torch.full((3, 4), 7, dtype=torch.int32, device=device)
    host = torch.zeros((SOURCE + 1, 32), dtype=torch.int32), torch.zeros((3, 4), dtype=torch.int32)
    given = [t.pin_memory() if device.type == "cuda" else t for t in host]
    fill_inputs(*given, torch.zeros(1, dtype=torch.int64, device=device), numbers, tables, 3, 1, 2)
    assert numbers[:, :4].tolist() == [[0, 7, 7, 7], [0, 7, 7, 7], [0, -1, -1, 7], [0, 1, 1, 7]]
    assert tables.tolist() == [[0, 0, 7, 7], [7] * 4, [7] * 4]
