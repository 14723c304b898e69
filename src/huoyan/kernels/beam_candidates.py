"""The likeliest tokens of a few rows of logits with their log-probabilities, in one pass over the logits.

A first kernel takes a chunk of a row: its largest value, its sum of exponentials and its likeliest tokens; a second one
joins the chunks of a row. Equal logits are taken in the order of their ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.launching import launch

CHUNK = 4096


def beam_candidates_reference(logits: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """In plain PyTorch: log-probabilities and ids [G, K, count]; of rows of -1 they mean nothing."""
    picked = logits[rows.clamp(min=0)].float()
    values, ids = picked.sort(stable=True, descending=True)
    return (values[..., :count] - picked.logsumexp(-1, keepdim=True)), ids[..., :count]


@triton.jit
def _key(x, token):
    """int64 that orders by value, and equal values by their ids, lowest last."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - token).to(tl.int64)


# One compiled form for searches of any width, with any number of tokens that end an answer.
_OF_SEARCHES = ["rows_ptr", "rows_stride", "width", "count"]


@triton.jit(do_not_specialize=_OF_SEARCHES)
def _chunk_kernel(
    logits_ptr, rows_ptr, keys_ptr, tops_ptr, sums_ptr, vocab, logits_stride, rows_stride, width, count,
    CHUNK: tl.constexpr,
):  # fmt: skip
    beam = tl.program_id(0)
    part = tl.program_id(1)
    at = beam * tl.num_programs(1) + part
    row = tl.load(rows_ptr + (beam // width) * rows_stride + beam % width)
    if row >= 0:
        token = part * CHUNK + tl.arange(0, CHUNK)
        ok = token < vocab
        x = tl.load(logits_ptr + row * logits_stride + token, mask=ok, other=float("-inf")).to(tl.float32)
        top = tl.max(x, axis=0)
        shift = tl.where(top > float("-inf"), top, 0.0)
        tl.store(tops_ptr + at, top)
        tl.store(sums_ptr + at, tl.sum(tl.exp(x - shift), axis=0))
        keys = tl.where(ok, _key(x, token), -0x7FFFFFFFFFFFFFFF)
        for i in range(count):
            best = tl.max(keys, axis=0)
            tl.store(keys_ptr + at * count + i, best)
            keys = tl.where(keys == best, -0x7FFFFFFFFFFFFFFF, keys)


@triton.jit(do_not_specialize=[*_OF_SEARCHES, "parts", "found_stride"])
def _join_kernel(
    rows_ptr, keys_ptr, tops_ptr, sums_ptr, found_ptr, parts, rows_stride, found_stride, width, count,
    FACTS: tl.constexpr, PARTS_PADDED: tl.constexpr, KEYS_PADDED: tl.constexpr,
):  # fmt: skip
    beam = tl.program_id(0)
    row = tl.load(rows_ptr + (beam // width) * rows_stride + beam % width)
    if row >= 0:
        part = tl.arange(0, PARTS_PADDED)
        tops = tl.load(tops_ptr + beam * parts + part, mask=part < parts, other=float("-inf"))
        sums = tl.load(sums_ptr + beam * parts + part, mask=part < parts, other=0.0)
        top = tl.max(tops, axis=0)
        shift = tl.where(top > float("-inf"), top, 0.0)
        normaliser = shift + tl.log(tl.sum(sums * tl.exp(tops - shift), axis=0))
        place = tl.arange(0, KEYS_PADDED)
        keys = tl.load(
            keys_ptr + beam * parts * count + place, mask=place < parts * count, other=-0x7FFFFFFFFFFFFFFF
        )
        found = found_ptr + beam * found_stride + FACTS
        for i in range(count):
            best = tl.max(keys, axis=0)
            ordered = (best >> 32).to(tl.int32)
            value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            tl.store(found + i, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32))
            tl.store(found + count + i, (value - normaliser).to(tl.int32, bitcast=True))
            keys = tl.where(keys == best, -0x7FFFFFFFFFFFFFFF, keys)


def beam_candidates(logits: Tensor, rows: Tensor, found: Tensor, facts: int) -> None:
    """Write the candidates of each beam to `found`.

    Args:
        logits: [R, vocab] of any float dtype, each row contiguous; computed in float32.
        rows: int64 [G, K], -1 where a beam has none: nothing is written for it.
        found: int32 [G, K, facts + 2 C], contiguous; C at most the vocabulary. Ids, likeliest first, go behind the
            facts, and behind them the bits of the float32 log-probabilities.
    """
    searches, width = rows.shape
    count = (found.shape[2] - facts) // 2
    vocab = logits.shape[1]
    parts = triton.cdiv(vocab, CHUNK)
    beams = searches * width
    keys = torch.empty((beams, parts, count), dtype=torch.int64, device=logits.device)
    tops, sums = torch.empty((2, beams, parts), dtype=torch.float32, device=logits.device).unbind(0)
    launch(
        _chunk_kernel, (beams, parts),
        logits, rows, keys, tops, sums, vocab, logits.stride(0), rows.stride(0), width, count,
        CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    launch(
        _join_kernel, (beams,),
        rows, keys, tops, sums, found, parts, rows.stride(0), found.stride(1), width, count,
        FACTS=facts, PARTS_PADDED=triton.next_power_of_2(parts),
        KEYS_PADDED=triton.next_power_of_2(parts * count), num_warps=4,
    )  # fmt: skip
