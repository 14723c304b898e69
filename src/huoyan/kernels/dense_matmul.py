"""Products of a few rows with a dense 16-bit matrix, for decode steps: as fast as the matrix can be read.

The matrix is the left operand, outputs by inputs, so that few rows fill the narrow side of the matrix units' tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, prefetch_lines, wait
from huoyan.kernels.launching import launch

MAX_ROWS = 16
"""More rows than this are for cuBLAS."""
BLOCK_K = 128
"""The inputs must be a multiple of it."""


def dense_matmul_reference(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [M, N] in plain PyTorch."""
    return x.float() @ weight.float().T


@dataclass(frozen=True)
class Tuning:
    """How one shape is cut: outputs of a program, programs that share the inputs, lines fetched ahead of the wait."""

    block_n: int
    split: int
    warps: int
    stages: int
    prefetch: int = 0
    block_k: int = BLOCK_K


# One form for all sizes: the fewer there are, the sooner a first start has compiled them.
@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, M, N, K,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    blocks = K // BLOCK_K
    per_split = tl.cdiv(blocks, SPLIT)
    first = split * per_split
    last = tl.minimum(first + per_split, blocks)
    n_ok = n < (N + BLOCK_N if EVEN else N)
    x_ok = (m < M)[:, None]
    row = weight_ptr + n[:, None].to(tl.int64) * K
    up = N.to(tl.int64) * K
    if PREFETCH:
        line = tl.minimum(first * BLOCK_K + tl.arange(0, PREFETCH)[None, :] * 64, K - 1)
        # Rows beyond the end would be lines of something else.
        ahead = weight_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + line
        prefetch_lines(ahead)
        if GATED:
            prefetch_lines(ahead + up)
    wait(OVERLAP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        at = block * BLOCK_K + k[None, :]
        w = tl.load(row + at, mask=n_ok[:, None], other=0.0)
        x = tl.trans(tl.load(x_ptr + m[:, None] * K + at, mask=x_ok, other=0.0))
        acc = tl.dot(w, x, acc)
        if GATED:
            w_up = tl.load(row + up + at, mask=n_ok[:, None], other=0.0)
            acc_up = tl.dot(w_up, x, acc_up)
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + (split * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & n_ok[:, None])


@lru_cache(maxsize=1024)
def choose(n: int, k: int, parts: bool = False) -> Tuning:
    """How a product is cut (searched, each cut in its place in a step, by `benchmarks/decode_step.py`)."""
    if not parts:
        return Tuning(block_n=64, split=1, warps=4, stages=4, prefetch=8)
    if n > k:
        # Queries, keys and values: the next kernel has a program for each head, which reads little of each part.
        return Tuning(block_n=128, split=max(1, min(k // BLOCK_K // 4, 7)), warps=4, stages=3, prefetch=4)
    # The norm that is next reads all parts of a row in one program: many cost there what they gain here.
    if k >= 8192:
        return Tuning(block_n=128, split=4, warps=8, stages=4, prefetch=4)
    split = max(1, min(k // BLOCK_K // 14, 8))
    return Tuning(block_n=64, split=split, warps=4, stages=6 if split < 4 else 4, prefetch=4)


def dense_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    parts: bool = False,
    dtype: torch.dtype | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """x [M, K] times weight [N, K], both float16 or bfloat16.

    Args:
        x: contiguous, K a multiple of 128, M at most MAX_ROWS.
        bias: [N], not of a gate; parts are without it, and so for whoever sums them.
        gated: the matrix is a gate's rows and then as many others: gives silu(gate) * other [M, N / 2].
        parts: where it is faster, give float32 [S, M, N], to be summed by whoever reads it.
        dtype: of the result, where it is not x's.

    Returns:
        [M, N], or parts.
    """
    m, k = x.shape
    n = weight.shape[0] // (2 if gated else 1)
    tuning = tuning or choose(n, k, parts)
    split = tuning.split
    if split > 1:
        out = torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    else:
        out = torch.empty((m, n), dtype=dtype or x.dtype, device=x.device)
    overlap = x.is_cuda and overlaps()
    launch(
        _matmul_kernel, (triton.cdiv(n, tuning.block_n), split),
        x, weight, bias if bias is not None else x, out, m, n, k,
        HAS_BIAS=bias is not None and split == 1, GATED=gated, SPLIT=split, EVEN=n % tuning.block_n == 0, BLOCK_M=16,
        BLOCK_N=tuning.block_n, BLOCK_K=tuning.block_k, STAGES=tuning.stages,
        PREFETCH=tuning.prefetch if overlap else 0, OVERLAP=overlap, num_warps=tuning.warps,
        **launch_options(overlap),
    )  # fmt: skip
    return out
