"""Products with an int4 matrix, unpacked in registers and multiplied on the matrix units: of the rows of any decode
step, and on cards with room for it of some hundred more, for which making the matrix dense first takes longer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from huoyan.kernels.arrivals import arrivals
from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, prefetch_lines, wait
from huoyan.kernels.int4_cuts import Tuning, choose, is_roomy
from huoyan.kernels.int4_unpack import load_meta, unpacked
from huoyan.kernels.int4_words import BLOCK, dequantize_reference, unpaired
from huoyan.kernels.launching import launch
from huoyan.kernels.processors import processors


def int4_matmul_reference(x: Tensor, words: Tensor, meta: Tensor, gated: bool = False) -> Tensor:
    """float32 [M, N] in plain PyTorch; `gated`: see `int4_matmul`."""
    weight = dequantize_reference(words, meta, x.dtype)
    if not gated:
        return x.float() @ weight.T
    gate, up = (x.float() @ unpaired(weight).T).chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


@triton.jit
def _settled(acc, ASM: tl.constexpr):
    """Sums as they are, but used before the next block. Without that Triton halves a block's product so that the halves
    overlap, and ptxas, which cannot follow it, has every single instruction of the matrix units wait for the last."""
    if ASM:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def _load_words(at, n_ok, EVEN: tl.constexpr):
    # A mask that is always true would still be looked at.
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=n_ok[:, None], other=0)


@triton.jit
def _again(number, ASM: tl.constexpr):
    """A number as one that is not known before."""
    if ASM:
        number = tl.inline_asm_elementwise(
            "mov.u32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
        )
    return number


@triton.jit
def _gated(acc):
    """Sums [N, M] of paired outputs -> silu(gate) * other, [N / 2, M]"""
    N: tl.constexpr = acc.shape[0]
    M: tl.constexpr = acc.shape[1]
    pairs = tl.permute(tl.reshape(acc, (N // 64, 2, 32, M)), (0, 2, 3, 1))
    gate, other = tl.split(pairs)
    return tl.reshape(gate / (1.0 + tl.exp(-gate)) * other, (N // 2, M))


@triton.jit
def _store(
    acc, bias_ptr, out_ptr, m, tile_n, split, M, N, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    if GATED:
        acc = _gated(acc)
        N = N // 2
    BLOCK_N: tl.constexpr = acc.shape[0]
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < (N + BLOCK_N if EVEN else N)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + (split * M + m[None, :]) * N + n[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & n_ok[:, None])


@triton.jit(do_not_specialize=["M", "whole"])
def _matmul_kernel(
    x_ptr, x_tiles, words_ptr, meta_ptr, bias_ptr, out_ptr, late_ptr, arrived_ptr, M, N, K, whole,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
    TILES: tl.constexpr, TAIL: tl.constexpr,
    ASM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    part, parts = split, SPLIT
    if TAIL > 1:
        late = tl.maximum(tile_n - whole, 0)
        parts = tl.where(tile_n < whole, 1, TAIL)
        part = late % TAIL
        tile_n = tl.minimum(tile_n, whole) + late // TAIL
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first_m = tl.program_id(2) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    j = tl.arange(0, 16)
    k = tl.arange(0, 128)
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    num_blocks = K // 128
    first = part * num_blocks // parts
    last = (part + 1) * num_blocks // parts
    n_ok = n < (N + BLOCK_N if EVEN else N)
    x_ok = (m < M)[:, None]
    tile = words_ptr + (n // 64)[:, None].to(tl.int64) * (K * 8)
    words_at = tile + (n % 64)[:, None] * 16 + j[None, :]
    if PREFETCH:
        # Half a line for each output and block.
        blocks = tl.minimum(first + tl.arange(0, PREFETCH), num_blocks - 1)[None, :]
        ahead = tile + blocks * 1024 + (n % 64)[:, None] * 16
        prefetch_lines(ahead)
    wait(OVERLAP)
    x_at = x_ptr + m[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        w = _load_words(words_at + block * 1024, n_ok, EVEN)
        if TILES:
            x = tl.trans(x_tiles.load([first_m, block * 128]))
        else:
            x = tl.trans(tl.load(x_at + block * 128, mask=x_ok, other=0.0))
        meta = load_meta(meta_ptr, n, n_ok, N, block, GROUP)
        weight = unpacked(w, meta, BF16, SCALED, ASM)
        if SCALED:
            acc = _settled(tl.dot(weight, x, acc), ASM)
        else:
            acc += tl.dot(weight, x) * meta.to(tl.int16).to(weight.dtype, bitcast=True).to(tl.float32)
    if TAIL > 1:
        # Nothing of what follows is kept in registers over the blocks.
        program = _again(tl.program_id(0), ASM)
        late = tl.maximum(program - whole, 0)
        part = late % TAIL
        tile_n = tl.minimum(program, whole) + late // TAIL
        if program >= whole:
            # A sum of a part of the inputs. Only whoever comes last goes on, with all of them.
            at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            sums = late_ptr + (late - part) * (BLOCK_N * BLOCK_M) + at
            tl.store(sums + part * (BLOCK_N * BLOCK_M), acc)
            tl.debug_barrier()
            before = tl.atomic_add(arrived_ptr + late // TAIL, 1, sem="acq_rel")
            if before == TAIL - 1:
                acc = tl.load(sums, cache_modifier=".cg")
                for other_part in tl.range(1, TAIL, num_stages=1):
                    acc += tl.load(sums + other_part * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
                _store(acc, bias_ptr, out_ptr, m, tile_n, split, M, N, HAS_BIAS, GATED, EVEN)
                tl.store(arrived_ptr + late // TAIL, 0)
        else:
            _store(acc, bias_ptr, out_ptr, m, tile_n, split, M, N, HAS_BIAS, GATED, EVEN)
    else:
        _store(acc, bias_ptr, out_ptr, m, tile_n, split, M, N, HAS_BIAS, GATED, EVEN)


def int4_matmul(
    x: Tensor,
    words: Tensor,
    meta: Tensor,
    bias: Tensor | None = None,
    *,
    parts: bool = False,
    gated: bool = False,
    tuning: Tuning | None = None,
) -> Tensor:
    """x [M, K] times the matrix of `words` (of `pack_words`) and `meta` [K / group_size, N].

    Args:
        x: float16 or bfloat16, contiguous, K a multiple of 128; M as `huoyan.kernels.int4_cuts.takes` has it.
        meta: of numbers of x's dtype.
        bias: [N]; parts are without it, and so for whoever sums them.
        parts: where it is faster, give float32 [S, M, N], to be summed by whoever reads it.
        gated: the matrix's outputs are `paired`, which has neither bias nor parts: gives silu(gate) * other [M, N / 2].

    Returns:
        [M, N] in the dtype of x, or parts.
    """
    m, k = x.shape
    n = meta.shape[1]
    group = k // meta.shape[0]
    tuning = tuning or choose(m, n, k, parts, is_roomy(x.device))
    split = tuning.split
    if split > 1:
        out = torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    else:
        out = torch.empty((m, n // 2 if gated else n), dtype=x.dtype, device=x.device)
    overlap = x.is_cuda and overlaps()
    programs = whole = triton.cdiv(n, tuning.block_n)
    tail, late, arrived = 1, out, out
    over = programs % (tuning.wave * processors(x.device, 1)) if tuning.wave else 0
    if over and split == 1 and m <= tuning.block_m:
        tail = min(tuning.tail, k // BLOCK)
    if tail > 1:
        whole = programs - over
        programs = whole + over * tail
        late = torch.empty(
            over * tail * tuning.block_n * tuning.block_m, dtype=torch.float32, device=x.device
        )
        arrived = arrivals(over, x.device)
    tiles = tuning.tiles and (overlap or not x.is_cuda)
    registers = {"maxnreg": tuning.registers} if x.is_cuda and tuning.registers else {}
    launch(
        _matmul_kernel, (programs, split, triton.cdiv(m, tuning.block_m)),
        x, TensorDescriptor(x, [m, k], [k, 1], [tuning.block_m, BLOCK]) if tiles else x, words, meta,
        x if bias is None else bias, out, late, arrived, m, n, k, whole,
        GROUP=group, HAS_BIAS=bias is not None and split == 1, GATED=gated, SPLIT=split,
        SCALED=group < BLOCK or tuning.scaled, EVEN=n % tuning.block_n == 0, BLOCK_M=tuning.block_m,
        BLOCK_N=tuning.block_n, STAGES=tuning.stages, PREFETCH=tuning.prefetch if overlap else 0,
        TILES=tiles, TAIL=tail, ASM=x.is_cuda, OVERLAP=overlap, num_warps=tuning.warps,
        **registers, **launch_options(overlap),
    )  # fmt: skip
    return out
