"""The likeliest tokens of rows of logits against plain PyTorch, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from huoyan.engine.likeliest import likeliest_reference
from huoyan.kernels.likeliest import CHUNK, likeliest


@pytest.mark.parametrize("rows, vocab", [(1, 5), (3, CHUNK), (4, CHUNK + 1), (7, 3 * CHUNK - 19)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_likeliest(seed: int, device: torch.device, rows: int, vocab: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    # Few values, so that many rows have several likeliest tokens; rows of a larger table, as graphs leave them.
    logits = torch.randn(rows + 2, vocab + 3, generator=g)[1 : rows + 1, :vocab] * 3
    logits[::2] = logits[::2].round()
    logits[:, torch.randint(vocab, (3,), generator=g)] = float("-inf")
    logits = logits.to(device, dtype)
    got, expected = likeliest(logits), likeliest_reference(logits)
    assert got.dtype == expected.dtype
    ids, logprobs = got[: 2 * rows].view(torch.int64), got[2 * rows :].view(torch.float32)
    assert torch.equal(ids, expected[: 2 * rows].view(torch.int64))
    assert torch.equal(ids.cpu(), torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits.cpu()]))
    torch.testing.assert_close(
        logprobs, expected[2 * rows :].view(torch.float32), atol=1e-5, rtol=1e-5, equal_nan=False
    )


def test_one_token_that_is_possible(device: torch.device) -> None:
    logits = torch.full((2, CHUNK + 5), float("-inf"), device=device)
    logits[0, CHUNK + 2], logits[1, 0] = -4.0, 7.0
    found = likeliest(logits)
    assert found[:4].view(torch.int64).tolist() == [CHUNK + 2, 0]
    assert found[4:].view(torch.float32).tolist() == [0.0, 0.0]


def test_no_numbers_give_a_token_that_there_is(device: torch.device) -> None:
    found = likeliest(torch.full((2, CHUNK + 5), float("nan"), device=device))
    assert all(0 <= token < CHUNK + 5 for token in found[:4].view(torch.int64).tolist())
