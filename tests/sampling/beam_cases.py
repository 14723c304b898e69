"""Random steps of several searches on tensors: orders of the host, and candidates of which many are equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from huoyan.layers.beam_step import FACTS, HEAD, SearchOrders, room_for_found

TOKENS = 40


def random_orders(
    g: torch.Generator, width: int, searches: int, step: int, device: torch.device
) -> SearchOrders:
    """Step 0 begins all searches, later ones some of them anew; `step` counts in the lengths."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    stops = 4
    table = torch.full((searches, SearchOrders.columns(width, stops)), -1, dtype=torch.int64)
    floats = table.view(torch.float64)
    first = HEAD + width + stops
    floats[:, first:] = -math.inf
    for i in range(searches):
        table[i, 0] = own = draw(max(width - 2, 1), width + 1)
        begins = step == 0 or draw(0, 4) == 0
        table[i, 1] = -1 if begins else draw(0, searches)
        table[i, 2], table[i, 3], table[i, 4] = draw(0, 3), draw(0, 9) == 0, draw(-1, TOKENS)
        penalty = [0.0, 1.0, -0.5, 2.0][draw(0, 4)]
        floats[i, 5:8] = torch.tensor([(5.0 + step + n) ** penalty for n in (0, -1, 30)], dtype=torch.float64)
        table[i, HEAD : HEAD + own] = torch.arange(own)
        some = draw(0, stops + 1)
        table[i, HEAD + width : HEAD + width + some] = torch.randint(0, TOKENS, (some,), generator=g)
        if begins:
            live, finished = draw(1, own + 1), draw(0, own + 1)
            sums = -torch.rand(own, generator=g, dtype=torch.float64).mul(8).round().div(2)
            floats[i, first : first + live] = sums[:live]
            scores = -torch.rand(own, generator=g, dtype=torch.float64).mul(8).round().div(2)
            floats[i, first + width : first + width + finished] = (
                scores[:finished].sort(descending=True).values
            )
    return SearchOrders(table.to(device), width, stops)


def random_found(g: torch.Generator, width: int, searches: int, count: int, device: torch.device) -> Tensor:
    """Candidates as a step writes them: different tokens, likeliest first, some barred; facts not filled in."""
    found = room_for_found(searches, width, count, torch.device("cpu")).fill_(-1)
    logprobs = -torch.rand(searches, width, count, generator=g).mul(8).round().div(4)
    logprobs = logprobs.sort(descending=True).values
    logprobs[torch.rand(logprobs.shape, generator=g) < 0.05] = -math.inf
    ids = torch.rand(searches, width, TOKENS, generator=g).argsort(-1)[..., :count]
    found[..., FACTS : FACTS + count] = ids
    found[..., FACTS + count :] = logprobs.view(torch.int32)
    return found.to(device)
