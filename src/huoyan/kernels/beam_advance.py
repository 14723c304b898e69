"""Which beams live on: one program a search decides as `huoyan.layers.beam_step.advance` does, its plain reference.

Places are counted, not sorted for: a hypothesis' place is how many are better, equal ones in their order. A search has
few enough of them (2 K for each of K beams) to hold each against all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.launching import launch
from huoyan.layers import beam_step
from huoyan.layers.beam_step import SearchOrders

MOST = 128
"""Candidates of a search, padded, that a program holds against each other."""


@triton.jit
def _count(flags, AXIS: tl.constexpr):
    return tl.sum(tl.where(flags, 1, 0), axis=AXIS)


# One compiled form for all widths of a power of two.
@triton.jit(do_not_specialize=["orders_stride", "before_width", "most", "count", "first_stop", "first_sum"])
def _kernel(
    orders_ptr, floats_ptr, before_ptr, found_ptr, state_ptr,
    orders_stride, before_width, most, count, first_stop, first_sum,
    BEAMS: tl.constexpr, EACH: tl.constexpr, FACTS: tl.constexpr,
):  # fmt: skip
    never: tl.constexpr = float("-inf")
    search = tl.program_id(0)
    orders = orders_ptr + search * orders_stride
    floats = floats_ptr + search * orders_stride
    width = tl.load(orders + 0)
    source = tl.load(orders + 1)
    early = tl.load(orders + 2)
    last = tl.load(orders + 3)
    eos = tl.load(orders + 4)
    power = tl.load(floats + 5)
    power_of_eos = tl.load(floats + 6)
    power_at_longest = tl.load(floats + 7)
    goes_on = source >= 0
    before = before_ptr + tl.maximum(source, 0) * 2 * before_width

    # All children, the candidates of each beam padded to a power of two.
    i = tl.arange(0, BEAMS * EACH)
    beam = i // EACH
    candidate = i % EACH
    there = (beam < most) & (candidate < count)
    kept_sum = tl.load(before + beam, mask=goes_on & (beam < before_width), other=never)
    own_sum = tl.load(floats + first_sum + beam, mask=beam < most, other=never)
    found = found_ptr + (search * most + beam) * (FACTS + 2 * count) + FACTS + candidate
    token = tl.load(found, mask=there, other=0).to(tl.int64)
    logprob = tl.load(found + count, mask=there, other=0).to(tl.float32, bitcast=True)
    total = tl.where(goes_on, kept_sum, own_sum) + logprob.to(tl.float64)
    total = tl.where(there & (total > never), total, never)
    better = (total[None, :] > total[:, None]) | (
        (total[None, :] == total[:, None]) & (i[None, :] < i[:, None])
    )
    order = _count(better, 1)
    is_child = (order < 2 * width) & (total > never)

    stopped = tl.zeros((BEAMS * EACH,), dtype=tl.int32)
    for at in range(first_stop, first_sum):
        stopped += tl.where(token == tl.load(orders + at), 1, 0)
    ends = (stopped > 0) | (last > 0)
    score = total / tl.where(token == eos, power_of_eos, power)

    # Finished hypotheses: those there were, and of equal ones behind them the new ones.
    slot = tl.arange(0, BEAMS)
    kept_score = tl.load(before + before_width + slot, mask=goes_on & (slot < before_width), other=never)
    own_score = tl.load(floats + first_sum + most + slot, mask=slot < most, other=never)
    old = tl.where(goes_on, kept_score, own_score)
    new = tl.where(is_child & ends, score, never)
    new_place = _count(old[None, :] >= new[:, None], 1) + _count(
        (new[None, :] > new[:, None]) | ((new[None, :] == new[:, None]) & (i[None, :] < i[:, None])), 1
    )
    old_place = slot + _count(new[None, :] > old[:, None], 1)
    from_new = (new_place[None, :] == slot[:, None]) & (new > never)[None, :]
    from_old = (old_place[None, :] == slot[:, None]) & (old > never)[None, :]
    filled = _count(from_new, 1) + _count(from_old, 1)
    finished = tl.sum(tl.where(from_new, new[None, :], 0.0), axis=1)
    finished += tl.sum(tl.where(from_old, old[None, :], 0.0), axis=1)
    finished = tl.where((filled > 0) & (slot < width), finished, never)

    # Those that go on, by score.
    going = tl.where(is_child & (ends == 0), score, never)
    ahead = (going[None, :] > going[:, None]) | (
        (going[None, :] == going[:, None]) & (order[None, :] < order[:, None])
    )
    place = tl.where(going > never, _count(ahead, 1), BEAMS * EACH)
    best_score = tl.sum(tl.where(place == 0, going, 0.0), axis=0)
    best_total = tl.sum(tl.where(place == 0, total, 0.0), axis=0)
    worst = tl.max(tl.where(slot == width - 1, finished, never), axis=0)
    at_best = tl.where(early == 2, best_total / power_at_longest, best_score)
    over = (worst > never) & ((early == 1) | (worst >= at_best))
    chosen = (place[None, :] == slot[:, None]) & (slot < width)[:, None] & (over == 0)
    alive = _count(chosen, 1) > 0
    parent = tl.sum(tl.where(chosen, beam[None, :], 0), axis=1)
    next_token = tl.sum(tl.where(chosen, token[None, :], 0), axis=1)
    sums = tl.where(alive, tl.sum(tl.where(chosen, total[None, :], 0.0), axis=1), never)

    # Whose block each beam takes: the first child of a beam its parent's, the others those of childless ones.
    same = alive[None, :] & (parent[None, :] == parent[:, None]) & (slot[None, :] < slot[:, None])
    first = alive & (_count(same, 1) == 0)
    fertile = _count(alive[:, None] & (parent[:, None] == slot[None, :]), 0) > 0
    moved = (slot < width) & (first == 0)
    spare = (slot < width) & (fertile == 0)
    moved_place = _count(moved[None, :] & (slot[None, :] < slot[:, None]), 1)
    spare_place = _count(spare[None, :] & (slot[None, :] < slot[:, None]), 1)
    pair = spare[None, :] & (spare_place[None, :] == moved_place[:, None])
    block = tl.where(first, parent, tl.sum(tl.where(pair, slot[None, :], 0), axis=1))

    facts = found_ptr + (search * most + slot) * (FACTS + 2 * count)
    in_width = slot < most
    tl.store(facts, tl.where(alive, parent, -1).to(tl.int32), mask=in_width)
    tl.store(facts + 1, tl.where(alive, next_token, -1).to(tl.int32), mask=in_width)
    tl.store(facts + 2, block.to(tl.int32), mask=in_width)
    tl.store(state_ptr + search * 2 * most + slot, sums, mask=in_width)
    tl.store(state_ptr + (search * 2 + 1) * most + slot, finished, mask=in_width)


def fits(width: int, count: int) -> bool:
    """Whether a search of so many beams, with so many candidates each, is small enough."""
    return bool(triton.next_power_of_2(width) * triton.next_power_of_2(count) <= MOST)


def beam_advance(orders: SearchOrders, found: Tensor, before: Tensor | None) -> Tensor:
    """See `huoyan.layers.beam_step.advance`; `found` and `before` are contiguous."""
    width = orders.width
    count = (found.shape[2] - beam_step.FACTS) // 2
    state = torch.empty((orders.searches, 2, width), dtype=torch.float64, device=found.device)
    launch(
        _kernel, (orders.searches,),
        orders.table, orders.floats, state if before is None else before, found, state,
        orders.table.stride(0), width if before is None else before.shape[2],
        width, count, orders.first_stop, orders.first_sum,
        BEAMS=triton.next_power_of_2(width), EACH=triton.next_power_of_2(count), FACTS=beam_step.FACTS,
        num_warps=4,
    )  # fmt: skip
    return state
