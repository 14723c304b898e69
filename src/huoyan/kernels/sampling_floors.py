"""The least logit that top-k, top-p and min-p let through, a row each program, without sorting.

The floor is searched bit by bit, from the highest: of the values that a row's numbers can have, in their order, the
largest at which still enough tokens, or enough of the probability, are as high. So what is kept is what a sorted row
would keep, and with the last token all that tie with it: see `huoyan.engine.draw`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.launching import launch

BLOCK = 8192
PASSES = {torch.float32: 16, torch.float16: 10, torch.bfloat16: 8}
"""Two bits each, as many as tell the numbers of a dtype apart: in float32 those of 16 bits have the same last ones."""


@triton.jit
def _ordered(x):
    """uint32 in the order of the values."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _value(ordered):
    bits = ordered.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _load(row_ptr, first, vocab, BLOCK: tl.constexpr):
    token = first + tl.arange(0, BLOCK)
    return tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _search(
    row_ptr, vocab, sharpness, top, least, wanted, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, PASSES: tl.constexpr
):  # fmt: skip
    """The largest value, or one between it and the next smaller, at and above which there are tokens enough: `wanted`
    of them, or of their weights exp((x - top) * sharpness) where `WEIGHTS`. Tokens below `least` do not count."""
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x40000000, tl.uint32)
    for _ in range(PASSES):
        one = found + bit
        two = one + bit
        three = two + bit
        of_one = tl.zeros((BLOCK,), dtype=tl.float32)
        of_two = tl.zeros((BLOCK,), dtype=tl.float32)
        of_three = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, vocab, BLOCK):
            x = _load(row_ptr, first, vocab, BLOCK)
            weight = tl.exp((x - top) * sharpness) if WEIGHTS else tl.full((BLOCK,), 1.0, tl.float32)
            weight = tl.where((x >= least) & (first + tl.arange(0, BLOCK) < vocab), weight, 0.0)
            key = _ordered(x)
            of_one += tl.where(key >= one, weight, 0.0)
            of_two += tl.where(key >= two, weight, 0.0)
            of_three += tl.where(key >= three, weight, 0.0)
        if tl.sum(of_three, axis=0) >= wanted:
            found = three
        elif tl.sum(of_two, axis=0) >= wanted:
            found = two
        elif tl.sum(of_one, axis=0) >= wanted:
            found = one
        bit = bit >> 2
    # What is at or below the place of -inf bars nothing, and would be no number where the last bits are missing.
    return tl.where(found > 0x007FFFFF, _value(found), float("-inf"))


@triton.jit
def _kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, index_ptr, floors_ptr, vocab, stride,
    BLOCK: tl.constexpr, INDEXED: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    by_count = (top_k > 0) & (top_k < vocab)
    floor = tl.full((), float("-inf"), tl.float32)
    if temperature > 0:  # noqa: SIM102 - a kernel's conditions are not short-circuited
        if by_count | (top_p < 1) | (min_p > 0):
            source = tl.load(index_ptr + row) if INDEXED else row
            row_ptr = logits_ptr + source * stride
            sharpness = 1.0 / temperature
            tops = tl.full((BLOCK,), float("-inf"), tl.float32)
            for first in range(0, vocab, BLOCK):
                tops = tl.maximum(tops, _load(row_ptr, first, vocab, BLOCK))
            top = tl.max(tops, axis=0)
            if by_count:
                floor = _search(
                    row_ptr, vocab, sharpness, top, floor, top_k.to(tl.float32), False, BLOCK, PASSES
                )
            if top_p < 1:
                mass = tl.zeros((BLOCK,), dtype=tl.float32)
                for first in range(0, vocab, BLOCK):
                    x = _load(row_ptr, first, vocab, BLOCK)
                    mass += tl.where(x >= floor, tl.exp((x - top) * sharpness), 0.0)
                wanted = tl.sum(mass, axis=0) * top_p
                floor = tl.maximum(
                    floor, _search(row_ptr, vocab, sharpness, top, floor, wanted, True, BLOCK, PASSES)
                )
            if min_p > 0:
                floor = tl.maximum(floor, top + tl.log(min_p) * temperature)
    tl.store(floors_ptr + row, floor)


def sampling_floors(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    index: Tensor | None = None,
) -> Tensor:
    """float32 [R]: of rows `index`, int64 [R], of logits [rows, vocab] of any float dtype (None: all), the least
    logit that may be drawn at its temperature; -inf where all may.

    All the others [R]: float32, top_k int32. A temperature of 0, a top_k of 0 or less, a top_p of 1 and a min_p of 0
    stand for none.
    """
    rows = len(temperature)
    floors = torch.empty(rows, dtype=torch.float32, device=logits.device)
    launch(
        _kernel, (rows,),
        logits, temperature, top_k, top_p, min_p, top_k if index is None else index, floors, logits.shape[1],
        logits.stride(0), BLOCK=BLOCK, INDEXED=index is not None, PASSES=PASSES[logits.dtype], num_warps=16,
    )  # fmt: skip
    return floors
