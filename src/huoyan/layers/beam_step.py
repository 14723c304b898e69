"""A step of beam searches on tensors: which beams live on, and what their rows of the next step are made of.

The decisions are those of `huoyan.engine.beam`, bit for bit: sums are float64 as the host's are, equal ones go by
their order, and the powers of lengths that scores are divided by come from the host. Nothing here waits for the
device or has a shape that depends on values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("-inf")
WIDTH, SOURCE, EARLY, LAST, EOS, POWER, POWER_OF_EOS, POWER_AT_LONGEST, HEAD = range(9)
"""Columns of `SearchOrders.table`; HEAD is how many they are."""
PARENT, TOKEN, BLOCK, FACTS = range(4)
"""What `found` has of each beam before its candidates; FACTS is how many they are."""


@dataclass(frozen=True)
class SearchOrders:
    """What the host says of G searches of up to K beams before a step.

    `table` is int64 [G, columns], numbers and bits of float64: the search's width; its place in the step before,
    or -1 where it begins with the host's numbers; how it may end early (1: at once, 2: by the score at the longest
    length, 0: by the present one); whether the step's token is the last by length; the end token; length **
    length_penalty of a child, of one that ends in the end token, and of the longest. Then, K or `stops` each: rows
    of the logits (-1: none), tokens that end an answer (padded with -1), the host's cumulative log-probabilities
    and its finished scores, best first (both padded with -inf, and only looked at where there is no step before).
    """

    table: Tensor
    width: int
    stops: int

    @property
    def searches(self) -> int:
        return len(self.table)

    @property
    def floats(self) -> Tensor:
        """The same memory as float64."""
        return self.table.view(torch.float64)

    @property
    def rows(self) -> Tensor:
        """int64 [G, K]"""
        return self.table[:, HEAD : HEAD + self.width]

    @property
    def first_stop(self) -> int:
        """Column of the first token that ends an answer."""
        return HEAD + self.width

    @property
    def first_sum(self) -> int:
        """Column of the first cumulative log-probability."""
        return self.first_stop + self.stops

    @staticmethod
    def columns(width: int, stops: int) -> int:
        return HEAD + 3 * width + stops


def room_for_found(searches: int, width: int, count: int, device: torch.device) -> Tensor:
    """int32 [G, K, FACTS + 2 C]: of each beam that lives on its parent, its token and whose current block it takes
    (-1, -1 and any other where none does); then of each beam that lived before its C candidates: ids, and the bits of
    their float32 log-probabilities, likeliest first. One tensor, so that one copy takes all of it to the host."""
    return torch.empty(searches, width, FACTS + 2 * count, dtype=torch.int32, device=device)


def top_candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row: logits [..., vocab] -> log-probabilities and ids [..., count]."""
    count = min(count, logits.shape[-1])
    best = logits.topk(count)
    return best.values - logits.logsumexp(-1, keepdim=True), best.indices


def advance(orders: SearchOrders, found: Tensor, before: Tensor | None) -> Tensor:
    """Take a step from the candidates in `found` (see `room_for_found`), whose facts are filled in.

    Args:
        before: what this function returned for the step before, where any search goes on from it.

    Returns:
        float64 [G, 2, K]: cumulative log-probabilities of the live beams, -inf where there is none; scores of the
        finished hypotheses, best first.
    """
    width = orders.width
    ints, floats = orders.table, orders.floats
    widths, _, early, last, eos = ints[:, :POWER].split(1, 1)
    power, power_of_eos, power_at_longest = floats[:, POWER:HEAD].split(1, 1)
    stops = ints[:, orders.first_stop : orders.first_sum]
    sums, finished = _state(orders, before).unbind(1)
    place = torch.arange(2 * width, device=ints.device)
    barred = torch.full((), NEVER, dtype=torch.float64, device=ints.device)

    count = (found.shape[2] - FACTS) // 2
    ids, bits = found[:, :, FACTS:].split(count, 2)
    totals = (sums.unsqueeze(2) + bits.contiguous().view(torch.float32)).flatten(1)
    # -inf and nan of beams that do not live, and of tokens that are barred.
    totals = torch.where(totals > NEVER, totals, barred)
    tokens = ids.flatten(1).long()
    short = max(2 * width - totals.shape[1], 0)
    totals, tokens = (
        torch.nn.functional.pad(x, (0, short), value=v) for x, v in ((totals, NEVER), (tokens, 0))
    )
    totals, order = (x[:, : 2 * width] for x in totals.sort(stable=True, descending=True))
    totals = torch.where(place < 2 * widths, totals, barred)
    parents, tokens = (order // count).clamp(max=width - 1), tokens.gather(1, order)

    ends = (tokens.unsqueeze(2) == stops.unsqueeze(1)).any(2) | (last > 0)
    scores = totals / torch.where(tokens == eos, power_of_eos, power)
    new = torch.cat((finished, torch.where(ends, scores, barred)), 1).sort(descending=True).values[:, :width]
    finished = torch.where(place[:width] < widths, new, barred)
    best, order = (x[:, :width] for x in torch.where(ends, barred, scores).sort(stable=True, descending=True))
    parents, tokens, totals = (x.gather(1, order) for x in (parents, tokens, totals))
    worst = finished.gather(1, widths - 1)
    at_best = torch.where(early == 2, totals[:, :1] / power_at_longest, best[:, :1])
    over = (worst > NEVER) & ((early == 1) | (worst >= at_best))
    alive = (best > NEVER) & (place[:width] < widths) & ~over
    found[:, :, PARENT] = torch.where(alive, parents, -1)
    found[:, :, TOKEN] = torch.where(alive, tokens, -1)
    found[:, :, BLOCK] = _blocks(parents, alive, widths)
    return torch.stack((torch.where(alive, totals, barred), finished), 1)


def move_rows(
    orders: Tensor,
    found: Tensor,
    block_size: int,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    tables: Tensor,
) -> tuple[Tensor, Tensor]:
    """Turn rows that were laid out as if every beam had but gone on into those of the beams that live on.

    A beam takes over its parent's blocks; the current one, which is written to, stays its parent's for the first of
    its children, and the others get those of beams without children, with the parent's contents.

    Args:
        orders: int64 [N, 4]: a row, its search in `found`, its beam there, and the row of the search's first beam.
        found: of the step before, see `room_for_found`.
        tokens, positions, slots: integers [T], the first and third changed.
        tables: integers [T, blocks], changed.

    Returns:
        Blocks (sources, targets), int64 [N] each, to be copied before the step; a block to itself where nothing is.
    """
    rows, searches, beams, firsts = orders.unbind(1)
    parents, chosen, blocks = found[searches, beams, :FACTS].long().clamp(min=0).unbind(1)
    at = positions[rows].long()
    column, offset = (at // block_size).unsqueeze(1), at % block_size
    table = tables[firsts + parents]
    sources = table.gather(1, column).squeeze(1)
    targets = tables[firsts + blocks].gather(1, column)
    tables.index_copy_(0, rows, table.scatter(1, column, targets))
    targets = targets.squeeze(1)
    slots.index_copy_(0, rows, targets.to(slots.dtype) * block_size + offset.to(slots.dtype))
    tokens.index_copy_(0, rows, chosen.to(tokens.dtype))
    return torch.where(offset > 0, sources, targets).long(), targets.long()


def _state(orders: SearchOrders, before: Tensor | None) -> Tensor:
    """float64 [G, 2, K]: what the searches go on from."""
    own: Tensor = orders.floats[:, orders.first_sum :].unflatten(1, (2, orders.width))
    if before is None:
        return own
    source = orders.table[:, SOURCE]
    kept = before[source.clamp(min=0)][:, :, : orders.width]
    state: Tensor = torch.nn.functional.pad(kept, (0, orders.width - kept.shape[2]), value=NEVER)
    return torch.where((source < 0).view(-1, 1, 1), own, state)


def _blocks(parents: Tensor, alive: Tensor, widths: Tensor) -> Tensor:
    """Whose current block each beam takes, int64 [G, K]: a permutation of the search's beams.

    parents, alive: [G, K]; widths: [G, 1].
    """
    place = torch.arange(parents.shape[1], device=parents.device)
    there = place < widths
    is_child = (parents.unsqueeze(2) == place) & alive.unsqueeze(2)
    earlier = is_child.long().cumsum(1).gather(2, parents.unsqueeze(2)).squeeze(2)
    first = alive & (earlier == 1)
    moved, spare = there & ~first, there & ~is_child.any(1)
    pairs = moved.unsqueeze(2) & spare.unsqueeze(1)
    pairs &= moved.long().cumsum(1).unsqueeze(2) == spare.long().cumsum(1).unsqueeze(1)
    return torch.where(first, parents, pairs.long().argmax(2))
