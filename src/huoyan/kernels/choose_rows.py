"""A token for each row of logits, the likeliest or one drawn, with its log-probability, in one pass over the logits.

A first kernel takes a chunk of a row: its largest value, where that stands first, its sum of exponentials, and of drawn
rows the best of the tokens under their noise; a second one joins the chunks of a row. In plain PyTorch it takes many
passes, and as much memory as the logits. The noise is that of `huoyan.engine.noise`: a token is drawn in proportion to
exp(x / temperature) where that over its noise, or the difference of their logarithms, is largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.chosen import ids_and_logprobs
from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, wait
from huoyan.kernels.launching import launch

CHUNK = 1024
"""Tokens a program takes, of one warp where nothing is drawn: its threads find the best of them without a barrier."""
_STEP = 8
"""Numbers of 16 bits that a thread reads at once, where rows lie so."""
_NONE = tl.constexpr(0x7FFFFFFF)
_RESULTS = [
    *(f"{name}_ptr" for name in ("tops", "tokens", "sums", "scores", "drawn", "own")),
    *(f"{name}_ptr" for name in ("ids", "logprobs", "host_ids", "host_logprobs")),
]
_GIVEN = [f"{name}_ptr" for name in ("temperature", "keys", "floors", "index", "barred")]


@dataclass(frozen=True)
class Draws:
    """How rows are drawn, tensors [R] on the logits' device."""

    temperature: Tensor
    """float32; 0 where the likeliest token is wanted."""
    keys: Tensor
    """int64, of `huoyan.engine.noise.mix`."""
    floors: Tensor | None = None
    """float32: tokens whose logit is below may not be drawn."""


@triton.jit
def _log_noise(key, token):
    """The logarithm of `huoyan.engine.noise.exponential`."""
    state = key.to(tl.uint64, bitcast=True) + token.to(tl.uint64) * 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    state = state ^ (state >> 31)
    uniform = ((state >> 24).to(tl.int64).to(tl.float32) + 0.5) * 9.094947017729282e-13  # 2 ** -40
    uniform = tl.minimum(uniform, 0.999999940395355)  # 1 - 2 ** -24
    # 1 - u has no room for a small u, for which three terms of the series are exact.
    small = uniform * (1.0 + uniform * (0.5 + uniform * 0.3333333333))
    return tl.log(tl.where(uniform < 0.0009765625, small, -tl.log(1.0 - uniform)))


# Where these lie differs from step to step: a form for each alignment would be compiled while others wait.
@triton.jit(do_not_specialize=_RESULTS[:6] + _GIVEN)
def _chunk_kernel(
    logits_ptr, tops_ptr, tokens_ptr, sums_ptr, scores_ptr, drawn_ptr, own_ptr, temperature_ptr, keys_ptr, floors_ptr,
    index_ptr, barred_ptr, vocab, stride, CHUNK: tl.constexpr, STEP: tl.constexpr, DRAWS: tl.constexpr,
    FLOORS: tl.constexpr, INDEXED: tl.constexpr, BARRED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * CHUNK + tl.arange(0, CHUNK)
    wait(OVERLAP)
    source = tl.load(index_ptr + row) if INDEXED else row
    # Multiples of STEP, so that the compiler sees how many numbers can be read at once.
    readable = token < tl.cdiv(vocab, STEP) * STEP
    number = source * (stride * STEP) + token
    x = tl.load(logits_ptr + number, mask=readable, other=float("-inf")).to(tl.float32)
    if STEP > 1:  # noqa: SIM102, known when compiled and known when run
        if (part + 1) * CHUNK > vocab:
            x = tl.where(token < vocab, x, float("-inf"))
    top = tl.max(x, axis=0)
    first = tl.min(tl.where(x == top, token, _NONE), axis=0)
    shift = tl.where(top > float("-inf"), top, 0.0)
    at = row * tl.num_programs(1) + part
    tl.store(tops_ptr + at, top)
    tl.store(tokens_ptr + at, first)
    tl.store(sums_ptr + at, tl.sum(tl.exp2((x - shift) * 1.4426950408889634), axis=0))
    if DRAWS or BARRED:
        temperature = 0.0
        if DRAWS:
            temperature = tl.load(temperature_ptr + row)
        differs = temperature > 0
        for i in tl.static_range(BARRED):
            barred = tl.load(barred_ptr + row * BARRED + i)
            differs = differs | ((barred >= part * CHUNK) & (barred < (part + 1) * CHUNK))
        # Elsewhere the likeliest one is what is chosen, as in most chunks that nothing is barred in.
        best, chosen, own = top, first, top
        if differs:
            score = x
            if DRAWS:  # noqa: SIM102, as above
                if temperature > 0:
                    score = x / temperature - _log_noise(tl.load(keys_ptr + row), token)
                    if FLOORS:
                        score = tl.where(x < tl.load(floors_ptr + row), float("-inf"), score)
            for i in tl.static_range(BARRED):
                score = tl.where(token == tl.load(barred_ptr + row * BARRED + i), float("-inf"), score)
            best = tl.max(score, axis=0)
            chosen = tl.min(tl.where(score == best, token, _NONE), axis=0)
            own = tl.max(tl.where(token == chosen, x, float("-inf")), axis=0)
        tl.store(scores_ptr + at, best)
        tl.store(drawn_ptr + at, chosen)
        tl.store(own_ptr + at, own)


@triton.jit(do_not_specialize=_RESULTS)
def _join_kernel(
    tops_ptr, tokens_ptr, sums_ptr, scores_ptr, drawn_ptr, own_ptr, ids_ptr, logprobs_ptr, host_ids_ptr,
    host_logprobs_ptr, parts, vocab, PADDED: tl.constexpr, SCORED: tl.constexpr, TO_HOST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0)
    part = tl.arange(0, PADDED)
    ok = part < parts
    at = row * parts + part
    wait(OVERLAP)
    tops = tl.load(tops_ptr + at, mask=ok, other=float("-inf"))
    top = tl.max(tops, axis=0)
    shift = tl.where(top > float("-inf"), top, 0.0)
    tokens = tl.load(tokens_ptr + at, mask=ok, other=_NONE)
    chosen = tl.min(tl.where(tops == top, tokens, _NONE), axis=0)
    own = top
    sums = tl.load(sums_ptr + at, mask=ok, other=0.0)
    total = tl.sum(sums * tl.exp(tops - shift), axis=0)
    if SCORED:
        scores = tl.load(scores_ptr + at, mask=ok, other=float("-inf"))
        drawn = tl.load(drawn_ptr + at, mask=ok, other=_NONE)
        chosen = tl.min(tl.where(scores == tl.max(scores, axis=0), drawn, _NONE), axis=0)
        owns = tl.load(own_ptr + at, mask=ok, other=float("-inf"))
        own = tl.max(tl.where(drawn == chosen, owns, float("-inf")), axis=0)
    # Logits that are no numbers give some token, and not one that there is not: the next step looks it up.
    token = tl.minimum(chosen, vocab - 1).to(tl.int64)
    logprob = own - shift - tl.log(total)
    tl.store(ids_ptr + row, token)
    tl.store(logprobs_ptr + row, logprob)
    if TO_HOST:
        tl.store(host_ids_ptr + row, token)
        tl.store(host_logprobs_ptr + row, logprob)


def choose_rows(
    logits: Tensor,
    draws: Draws | None = None,
    index: Tensor | None = None,
    barred: Tensor | None = None,
    to_host: Tensor | None = None,
) -> Tensor:
    """int32 [3 R] of rows `index`, int64 [R], of logits [rows, vocab] of any float dtype (None: all of them): the bits
    of R ids (int64), then those of R log-probabilities (float32), so that one copy brings both to the host.

    `to_host`: another int32 [3 R], of memory of the host that the device can write to, which gets the same.
    `barred`: int32 [R, B], tokens that are not to be chosen, filled up with -1; no floor is looked for without them.
    Log-probabilities are those of the logits as they are. Of equal logits the lowest id is the likeliest.
    """
    vocab = logits.shape[1]
    rows = len(logits if index is None else index)
    parts = triton.cdiv(vocab, CHUNK)
    found = torch.empty(3 * rows, dtype=torch.int32, device=logits.device)
    values = torch.empty((4, rows, parts), dtype=torch.float32, device=logits.device)
    tops, sums, scores, own = values.unbind(0)
    tokens, drawn = torch.empty((2, rows, parts), dtype=torch.int32, device=logits.device).unbind(0)
    overlap = logits.is_cuda and overlaps()
    step = _read_at_once(logits)
    temperature, keys, floors = (draws.temperature, draws.keys, draws.floors) if draws else (tops, tops, None)
    launch(
        _chunk_kernel, (rows, parts),
        logits, tops, tokens, sums, scores, drawn, own, temperature, keys, tops if floors is None else floors,
        tokens if index is None else index, tokens if barred is None else barred, vocab,
        logits.stride(0) // step, CHUNK=CHUNK, STEP=step, DRAWS=draws is not None, FLOORS=floors is not None,
        INDEXED=index is not None, BARRED=0 if barred is None else barred.shape[1], OVERLAP=overlap,
        # A draw has more numbers in hand for each token.
        num_warps=1 if draws is None else 2, **launch_options(overlap),
    )  # fmt: skip
    launch(
        _join_kernel, (rows,),
        tops, tokens, sums, scores, drawn, own, *ids_and_logprobs(found),
        *ids_and_logprobs(found if to_host is None else to_host), parts, vocab,
        PADDED=triton.next_power_of_2(parts), SCORED=draws is not None or barred is not None,
        TO_HOST=to_host is not None, OVERLAP=overlap, num_warps=1, **launch_options(overlap),
    )  # fmt: skip
    return found


def _read_at_once(logits: Tensor) -> int:
    """Numbers of a row that may be read at once: what lies behind its last ones must be memory of the tensor too."""
    stride = logits.stride(0)
    end = logits.storage_offset() + (len(logits) - 1) * stride + triton.cdiv(logits.shape[1], _STEP) * _STEP
    inside = end * logits.itemsize <= logits.untyped_storage().nbytes()
    return _STEP if stride % _STEP == 0 and inside else 1
