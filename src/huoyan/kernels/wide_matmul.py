"""Products of some rows with a large dense 16-bit matrix on Hopper, for steps of 17 to 128 decodes: as fast as the
matrix can be read, with the gate inside, and launched while the kernel before ends.

The matrix is the left operand and comes, as the rows do, by the tensor memory unit. A program takes 128 outputs, or
144: the published gate is 132 tiles of these, one for each processor of an H100.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, prefetch_lines, wait
from huoyan.kernels.launching import launch, launches_are_noted
from huoyan.kernels.processors import PUBLISHED, processors
from huoyan.planning.pieces import WIDE_PARTS, WIDE_ROWS

log = logging.getLogger(__name__)

BLOCK_K = 128
"""The inputs must be a multiple of it."""
LEAST = 1 << 23
"""Values of a matrix that are worth it."""
FEWER = 64
"""Rows up to which a square matrix is, and beyond which one of more outputs than inputs."""
_TILE = 128
_REST = 16


def wide_matmul_reference(x: Tensor, weight: Tensor, gated: bool = False) -> Tensor:
    """float32 [M, N] in plain PyTorch."""
    out = x.float() @ weight.float().T
    if not gated:
        return out
    gate, up = out.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


@dataclass(frozen=True)
class Tuning:
    """How a product is cut: outputs of a program are `tile` and `rest` (none or 16) more."""

    tile: int
    rest: int
    split: int
    block_k: int
    warps: int
    stages: int
    prefetch: int = 0
    """Lines of each row fetched ahead of the wait."""


@triton.jit
def _gate(a, b):
    return a / (1.0 + tl.exp(-a)) * b


@triton.jit
def _kernel(
    x_desc, tile_desc, rest_desc, weight_ptr, out_ptr, M, N, K,
    GATED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, REST: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    n0 = tl.program_id(0) * (TILE + REST)
    split = tl.program_id(1)
    blocks = K // BLOCK_K
    first = split * blocks // SPLIT
    last = (split + 1) * blocks // SPLIT
    if PREFETCH:
        n = tl.minimum(n0 + tl.arange(0, TILE), N - 1)
        line = first * BLOCK_K + tl.arange(0, PREFETCH)[None, :] * 64
        ahead = weight_ptr + n[:, None].to(tl.int64) * K + line
        prefetch_lines(ahead)
        if GATED:
            prefetch_lines(ahead + N.to(tl.int64) * K)
    wait(OVERLAP)
    acc = tl.zeros((TILE, BLOCK_M), dtype=tl.float32)
    acc_up = tl.zeros((TILE, BLOCK_M), dtype=tl.float32)
    # So few outputs are the narrow side of the matrix units' tiles, and the rows the other.
    rest = tl.zeros((BLOCK_M, REST if REST else 16), dtype=tl.float32)
    rest_up = tl.zeros((BLOCK_M, REST if REST else 16), dtype=tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        at = block * BLOCK_K
        x = x_desc.load([0, at])
        acc = tl.dot(tile_desc.load([n0, at]), x.T, acc)
        if REST:
            rest = tl.dot(x, rest_desc.load([n0 + TILE, at]).T, rest)
        if GATED:
            acc_up = tl.dot(tile_desc.load([N + n0, at]), x.T, acc_up)
            if REST:
                rest_up = tl.dot(x, rest_desc.load([N + n0 + TILE, at]).T, rest_up)
    if GATED:
        acc = _gate(acc, acc_up)
        rest = _gate(rest, rest_up)
    m = tl.arange(0, BLOCK_M)
    row = out_ptr + (split * M + m[:, None]).to(tl.int64) * N
    # Tiles reach beyond the outputs, a gate's into what it gates.
    n = n0 + tl.arange(0, TILE)[None, :]
    tl.store(row + n, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N))
    if REST:
        n = n0 + TILE + tl.arange(0, REST)[None, :]
        tl.store(row + n, rest.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N))


def takes(x: Tensor, weight: Tensor, gated: bool = False) -> bool:
    """Whether this is the way of x [M, K] through a dense matrix [N, K]: a gate's, of many more inputs than outputs, or
    where the rows are so many that cuBLAS is not as fast."""
    n, k = weight.shape
    if not gated and 2 * n > k and (len(x) > FEWER) != (n > k):
        return False
    if not (x.is_cuda and x.dim() == 2 and x.dtype in (torch.float16, torch.bfloat16)):
        return False
    if not (
        overlaps() and 16 < len(x) <= WIDE_ROWS and weight.numel() >= LEAST and not torch.is_grad_enabled()
    ):
        return False
    if not x.is_contiguous() or x.shape[1] % BLOCK_K != 0:
        return False
    # To try it would compile it here and now.
    return launches_are_noted() or _works(x.device, x.dtype)


@lru_cache(maxsize=256)
def choose(rows: int, n: int, k: int, gated: bool, processors: int) -> Tuning:
    """How a product is cut (searched on an H100, see benchmarks/NOTES.md)."""
    if not gated:
        if n == k:
            return Tuning(64, 0, 2, block_k=128, warps=4, stages=4, prefetch=16)
        split = min(max(processors // triton.cdiv(n, _TILE), 1), WIDE_PARTS)
        return Tuning(_TILE, 0, split, block_k=128, warps=8, stages=3, prefetch=16 if n > k else 0)
    # Outputs' time is that of the rounds of programs that processors take one of at a time.
    rest = min((0, _REST), key=lambda more: _rounds(n, _TILE + more, processors) * (_TILE + more))
    if rows <= 64:
        return Tuning(_TILE, rest, 1, block_k=128, warps=8, stages=2)
    return Tuning(_TILE, rest, 1, block_k=64, warps=8, stages=4, prefetch=2)


def _rounds(n: int, tile: int, processors: int) -> int:
    return -(-n // (tile * processors))


@lru_cache(maxsize=8)
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs here and gives what it should, tried on a few numbers: a card may lack the shared memory
    that an H100's processors have, and Triton the tensor memory unit."""
    try:
        for rows, n, k in (
            (128, 18944, 3584),
            (64, 18944, 3584),
            (128, 3584, 18944),
            (128, 4608, 3584),
            (64, 3584, 3584),
        ):
            gated = n > 2 * k
            outputs, width = (288, 256) if gated else (256, 1024)
            x, weight = (
                torch.sin(torch.arange(m * width, device=device).view(m, width) * 0.37).to(dtype)
                for m in (rows, outputs)
            )
            cut = choose(rows, n, k, gated, PUBLISHED)
            got = wide_matmul(x, weight, gated=gated, tuning=cut).float()
            got = got.sum(0) if got.dim() == 3 else got
            # By the host: for its products cuBLAS would keep a workspace of this stream.
            want = wide_matmul_reference(x.cpu(), weight.cpu(), gated)
            off = (got.cpu() - want).norm() / want.norm()
            if not off < 0.02:
                log.warning("our kernel for products of some rows is not taken: it is off by %.2g here", off)
                return False
    except Exception as error:
        log.info("our kernel for products of some rows does not run here: %s", str(error).splitlines()[:1])
        return False
    return True


def wide_matmul(x: Tensor, weight: Tensor, *, gated: bool = False, tuning: Tuning | None = None) -> Tensor:
    """x [M, K] times weight [N, K], both float16 or bfloat16.

    Args:
        x: contiguous, K a multiple of 128, M at most `WIDE_ROWS`.
        gated: the matrix is a gate's rows and then as many others: gives silu(gate) * other [M, N / 2].
        tuning: how it is cut, else as `choose` says.

    Returns:
        [M, N], or where programs share the inputs float32 parts [S, M, N], to be summed by whoever reads them.
    """
    m, k = x.shape
    n = weight.shape[0] // (2 if gated else 1)
    cut = tuning or choose(m, n, k, gated, processors(x.device))
    shape, dtype = ((cut.split, m, n), torch.float32) if cut.split > 1 else ((m, n), x.dtype)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    block_m = max(16, triton.next_power_of_2(m))
    described = [
        TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cut.block_k])
        for t, rows in ((x, block_m), (weight, cut.tile), (weight, _REST))
    ]
    overlap = x.is_cuda and overlaps()
    launch(
        _kernel, (triton.cdiv(n, cut.tile + cut.rest), cut.split),
        *described, weight, out, m, n, k,
        GATED=gated, SPLIT=cut.split, BLOCK_M=block_m, TILE=cut.tile, REST=cut.rest, BLOCK_K=cut.block_k,
        STAGES=cut.stages, PREFETCH=cut.prefetch if overlap else 0, OVERLAP=overlap, num_warps=cut.warps,
        **launch_options(overlap),
    )  # fmt: skip
    return out
