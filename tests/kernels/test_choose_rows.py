"""Tokens chosen from rows of logits by our kernels against plain PyTorch, on fresh random inputs."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.draw import Filters, _floors
from huoyan.engine.noise import exponential
from huoyan.engine.plain_tokens import likeliest_reference
from huoyan.kernels.choose_rows import CHUNK, Draws, choose_rows
from huoyan.kernels.sampling_floors import sampling_floors


def random_logits(seed: int, rows: int, vocab: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    # Few values, so that many rows have several likeliest tokens; rows of a larger table, as graphs leave them.
    logits = torch.randn(rows + 2, vocab + 3, generator=g)[1 : rows + 1, :vocab] * 3
    logits[::2] = logits[::2].round()
    logits[:, torch.randint(vocab, (3,), generator=g)] = float("-inf")
    return logits


def apart(found: Tensor) -> tuple[Tensor, Tensor]:
    rows = len(found) // 3
    return found[: 2 * rows].view(torch.int64), found[2 * rows :].view(torch.float32)


SHAPES = [(1, 5), (3, CHUNK), (4, CHUNK + 1), (7, 3 * CHUNK - 19)]


@pytest.mark.parametrize("rows, vocab", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_likeliest(seed: int, device: torch.device, rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits = random_logits(seed, rows, vocab).to(device, dtype)
    got, expected = choose_rows(logits), likeliest_reference(logits)
    assert got.dtype == expected.dtype
    ids, logprobs = apart(got)
    assert torch.equal(ids, apart(expected)[0])
    assert torch.equal(ids.cpu(), torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits.cpu()]))
    torch.testing.assert_close(logprobs, apart(expected)[1], atol=1e-5, rtol=1e-5)
    index = torch.randperm(rows)[: rows // 2 + 1].to(device)
    some, same = (apart(choose(logits, index=index)) for choose in (choose_rows, likeliest_reference))
    assert torch.equal(some[0], ids[index])
    assert torch.equal(some[0], same[0])
    host = torch.empty(len(got), dtype=torch.int32, pin_memory=device.type == "cuda")
    again = choose_rows(logits, to_host=host)
    assert torch.equal(again.cpu(), got.cpu())
    assert torch.equal(host, got.cpu())
    torch.testing.assert_close(some[1], same[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [CHUNK - 3, 2 * CHUNK, 2 * CHUNK + 5])
def test_what_lies_behind_a_row_is_not_its_own(seed: int, device: torch.device, vocab: int) -> None:
    """Rows of the published head are wider than the vocabulary, and are read several numbers at once."""
    logits = random_logits(seed, 4, vocab).bfloat16().to(device)
    wide = torch.full((4, 3 * CHUNK), float("nan"), dtype=torch.bfloat16, device=device)
    wide[::2, vocab:] = float("inf")
    wide[:, :vocab] = logits
    keys = torch.arange(4, device=device)
    for draws in (None, Draws(torch.tensor([0.5, 0.0, 1.0, 2.0], device=device), keys)):
        ids, logprobs = apart(choose_rows(wide[:, :vocab], draws))
        own_ids, own_logprobs = apart(choose_rows(logits, draws))
        assert torch.equal(ids, own_ids)
        # Other threads have the numbers, so sums are made in another order.
        torch.testing.assert_close(logprobs, own_logprobs, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("with_draws", [False, True])
def test_barred_tokens_are_not_chosen(seed: int, device: torch.device, with_draws: bool) -> None:
    rows, vocab = 5, CHUNK + 30
    logits = random_logits(seed, rows, vocab).to(device)
    best = logits.topk(3).indices
    barred = torch.full((rows, 4), -1, dtype=torch.int32, device=device)
    barred[1, 2], barred[2, :3], barred[4, 0] = best[1, 0], best[2], best[4, 1]
    g = torch.Generator().manual_seed(seed)
    keys = torch.randint(1 << 40, (rows,), generator=g).to(device)
    draws = Draws(torch.tensor([0.0, 0.0, 0.0, 0.7, 0.7], device=device), keys) if with_draws else None
    ids, logprobs = apart(choose_rows(logits, draws, barred=barred))
    masked = logits.clone()
    for row in range(rows):
        masked[row, barred[row][barred[row] >= 0].long()] = float("-inf")
    greedy = slice(0, 3) if with_draws else slice(0, rows)
    assert torch.equal(ids[greedy], apart(likeliest_reference(masked))[0][greedy])
    assert not (ids.unsqueeze(1) == barred).any()
    # The model's own, what was barred included.
    own = logits.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs, own, atol=1e-5, rtol=1e-5)


def test_one_token_that_is_possible(device: torch.device) -> None:
    logits = torch.full((2, CHUNK + 5), float("-inf"), device=device)
    logits[0, CHUNK + 2], logits[1, 0] = -4.0, 7.0
    keys = torch.tensor([3, 5], device=device)
    for draws in (None, Draws(torch.tensor([0.5, 0.0], device=device), keys)):
        ids, logprobs = apart(choose_rows(logits, draws))
        assert ids.tolist() == [CHUNK + 2, 0]
        assert logprobs.tolist() == [0.0, 0.0]


def test_no_numbers_give_a_token_that_there_is(device: torch.device) -> None:
    logits = torch.full((2, CHUNK + 5), float("nan"), device=device)
    draws = Draws(torch.tensor([0.5, 0.0], device=device), torch.tensor([3, 5], device=device))
    for how in (None, draws):
        assert all(0 <= token < CHUNK + 5 for token in apart(choose_rows(logits, how))[0].tolist())


@pytest.mark.parametrize("floors", [False, True])
@pytest.mark.parametrize("rows, vocab", SHAPES)
def test_drawn(seed: int, device: torch.device, rows: int, vocab: int, floors: bool) -> None:
    rng = random.Random(seed)
    logits = random_logits(seed, rows, vocab)
    temperature = torch.tensor([rng.choice([0.0, 0.3, 1.0, 1.7]) for _ in range(rows)])
    keys = torch.tensor([rng.randrange(-(2**63), 2**63) for _ in range(rows)])
    floor = torch.tensor([rng.choice([-9.0, 0.0]) for _ in range(rows)])
    scaled = logits / temperature.clamp(min=1e-9).unsqueeze(1)
    floor = torch.minimum(floor, logits.amax(1))
    barred = logits < floor.unsqueeze(1) if floors else torch.zeros_like(scaled, dtype=torch.bool)
    noise = exponential(keys.unsqueeze(1), torch.arange(vocab)).double()
    scores = (scaled.double() - noise.log()).masked_fill_(barred, float("-inf"))
    scores[temperature == 0] = logits[temperature == 0].double()
    draws = Draws(temperature.to(device), keys.to(device), floor.to(device) if floors else None)
    ids, logprobs = (part.cpu() for part in apart(choose_rows(logits.to(device), draws)))
    at = torch.arange(rows)
    # The best, or what rounding cannot tell from it.
    assert (scores.amax(1) - scores[at, ids] < 1e-4).all()
    assert (ids == scores.argmax(1)).float().mean() > 0.7
    torch.testing.assert_close(logprobs, logits.log_softmax(1)[at, ids], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [7, 2048, 9003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floors_are_those_of_sorted_rows(
    seed: int, device: torch.device, vocab: int, dtype: torch.dtype
) -> None:
    rng = random.Random(seed)
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 0.5, 1.0, 1.3]),
            top_k=rng.choice([-1, -1, 1, 3, 5, vocab]),
            top_p=rng.choice([1.0, 1.0, 0.1, 0.7, 0.95]),
            min_p=rng.choice([0.0, 0.0, 0.05, 0.9]),
        )
        for _ in range(12)
    ]
    logits = random_logits(seed, len(params), vocab).to(dtype).float()
    column = [
        torch.tensor([float(getattr(p, name)) for p in params], device=device)
        for name in ("temperature", "top_k", "top_p", "min_p")
    ]
    got = sampling_floors(logits.to(device, dtype), column[0], column[1].int(), *column[2:]).cpu()
    there = torch.randperm(len(params))
    back = logits[there.argsort()].to(device, dtype)
    indexed = sampling_floors(back, column[0], column[1].int(), *column[2:], there.to(device))
    assert not torch.equal(back.cpu().float(), logits)
    assert torch.equal(logits[:1], back.cpu().float()[there][:1])
    assert torch.equal(indexed.cpu(), got)
    for row, own in zip(range(len(params)), params, strict=True):
        if own.temperature == 0:
            assert got[row] == float("-inf")
            continue
        x = logits[row : row + 1] / own.temperature
        values = x.sort(descending=True).values
        expected = _floors(values, x, Filters.of([own], vocab, x.device))[1]
        kept, wanted = logits[row] >= got[row], x[0] >= expected[0]
        if own.top_p == 1.0 and own.min_p == 0.0:
            assert torch.equal(kept, wanted), own
        else:
            # Sums and bounds that differ by rounding may keep one value more, or less.
            assert len(x[0][kept != wanted].unique()) <= 1, own
            assert kept.any()
