"""The likeliest token of each row of logits with its log-probability, in one pass over the logits.

A first kernel takes a chunk of a row: its largest value, where that stands first, and its sum of exponentials; a second
one joins the chunks of a row. In plain PyTorch it takes three passes, and as much memory as the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096


@triton.jit
def _chunk_kernel(
    logits_ptr, tops_ptr, tokens_ptr, sums_ptr, vocab, stride, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride + token, mask=token < vocab, other=float("-inf"))
    x = x.to(tl.float32)
    top = tl.max(x, axis=0)
    shift = tl.where(top > float("-inf"), top, 0.0)
    at = row * tl.num_programs(1) + part
    tl.store(tops_ptr + at, top)
    tl.store(tokens_ptr + at, tl.min(tl.where(x == top, token, 0x7FFFFFFF), axis=0))
    tl.store(sums_ptr + at, tl.sum(tl.exp(x - shift), axis=0))


@triton.jit
def _join_kernel(
    tops_ptr, tokens_ptr, sums_ptr, ids_ptr, logprobs_ptr, parts, vocab, PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.arange(0, PADDED)
    ok = part < parts
    at = row * parts + part
    tops = tl.load(tops_ptr + at, mask=ok, other=float("-inf"))
    top = tl.max(tops, axis=0)
    shift = tl.where(top > float("-inf"), top, 0.0)
    tokens = tl.load(tokens_ptr + at, mask=ok, other=0x7FFFFFFF)
    # Logits that are no numbers give some token, and not one that there is not: the next step looks it up.
    best = tl.minimum(tl.min(tl.where(tops == top, tokens, 0x7FFFFFFF), axis=0), vocab - 1)
    tl.store(ids_ptr + row, best.to(tl.int64))
    sums = tl.load(sums_ptr + at, mask=ok, other=0.0)
    total = tl.sum(sums * tl.exp(tops - shift), axis=0)
    tl.store(logprobs_ptr + row, top - shift - tl.log(total))


def likeliest(logits: Tensor) -> Tensor:
    """Of logits [R, vocab], of any float dtype: int32 [3 R], the bits of R ids (int64), then those of R float32
    log-probabilities, so that one copy brings both to the host. Of equal logits the lowest id is taken."""
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, CHUNK)
    found = torch.empty(3 * rows, dtype=torch.int32, device=logits.device)
    tops, sums = torch.empty((2, rows, parts), dtype=torch.float32, device=logits.device).unbind(0)
    tokens = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    _chunk_kernel[(rows, parts)](
        logits, tops, tokens, sums, vocab, logits.stride(0), CHUNK=CHUNK, num_warps=8
    )
    ids, logprobs = found[: 2 * rows].view(torch.int64), found[2 * rows :].view(torch.float32)
    _join_kernel[(rows,)](
        tops, tokens, sums, ids, logprobs, parts, vocab, PADDED=triton.next_power_of_2(parts), num_warps=1
    )
    return found
