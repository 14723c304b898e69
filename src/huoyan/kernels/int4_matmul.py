"""Products of a few rows with an int4 matrix: the weights are read once, unpacked in registers.

Layout of the packed weight, `words` int32 [N, K / 8]: inputs are taken in blocks of 128, which are 16 words;
nibble i of word j of a block holds input 16 i + j of the block. So the same nibble of 16 neighbouring words
is 16 neighbouring inputs, which is what a row of activations is read by.

Two kernels, chosen by the number of rows: `_rows_kernel` multiplies on the ordinary float units (it builds
float32 values from nibbles by placing them in the mantissa of a constant), `_tile_kernel` on the matrix
units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
"""Inputs in a block of 16 words."""
MAX_ROWS = 64
"""More rows than this are for a dense product of the dequantized matrix."""


def pack_words(q: Tensor) -> Tensor:
    """uint8 [N, K] of values 0 to 15, K a multiple of 128 -> int32 [N, K / 8] in the layout above."""
    nibbles = q.unflatten(1, (-1, 8, 16)).to(torch.int32)
    words: Tensor = nibbles[:, :, 0].clone()
    for i in range(1, 8):
        words |= nibbles[:, :, i] << (4 * i)
    return words.flatten(1)


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of `pack_words`."""
    blocks = words.unflatten(1, (-1, 16))
    return torch.stack([(blocks >> (4 * i)) & 15 for i in range(8)], dim=2).to(torch.uint8).flatten(1)


def int4_matmul_reference(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """float32 [M, N] in plain PyTorch: x [M, K], scales and zeros [N, K / group_size]."""
    return x.float() @ dequantize_reference(words, scales, zeros).T


def dequantize_reference(words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """float32 [N, K]."""
    q = unpack_words(words).unflatten(1, (scales.shape[1], -1)).float()
    weight: Tensor = (q - zeros.float().unsqueeze(-1)) * scales.float().unsqueeze(-1)
    return weight.flatten(1)


@dataclass(frozen=True)
class Tuning:
    """How one shape is cut: columns and 128-blocks a program takes at a time, programs sharing the inputs."""

    block_n: int
    blocks: int
    split: int
    warps: int
    stages: int = 3


@triton.jit
def _rows_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    N, K,
    M: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    b = tl.arange(0, BLOCKS)
    j = tl.arange(0, 16)
    num_blocks = K // 128
    per_split = tl.cdiv(tl.cdiv(num_blocks, SPLIT), BLOCKS) * BLOCKS
    first = split * per_split
    last = tl.minimum(first + per_split, num_blocks)
    groups = K // GROUP
    row = n[:, None, None]
    row_ok = row < N
    acc = tl.zeros((M, BLOCK_N, BLOCKS, 16), dtype=tl.float32)
    for start in range(first, last, BLOCKS):
        block = (start + b)[None, :, None]
        ok = block < last
        w = tl.load(
            words_ptr + row.to(tl.int64) * (K // 8) + block * 16 + j[None, None, :], mask=row_ok & ok, other=0
        )
        up8 = w << 8
        down8 = w >> 8
        one = 0x3F800000
        high = 0x000F0000
        low = 0x0000F000
        f0 = (((w << 16) & high) | one).to(tl.float32, bitcast=True)
        f1 = ((up8 & low) | one).to(tl.float32, bitcast=True)
        f2 = ((up8 & high) | one).to(tl.float32, bitcast=True)
        f3 = ((w & low) | one).to(tl.float32, bitcast=True)
        f4 = ((w & high) | one).to(tl.float32, bitcast=True)
        f5 = ((down8 & low) | one).to(tl.float32, bitcast=True)
        f6 = ((down8 & high) | one).to(tl.float32, bitcast=True)
        f7 = (((w >> 12) & high) | one).to(tl.float32, bitcast=True)
        m = tl.arange(0, M)[:, None, None, None]
        x_at = x_ptr + m * K + block[None] * 128 + j[None, None, None, :]
        x_ok = ok[None]
        x0 = tl.load(x_at, mask=x_ok, other=0.0).to(tl.float32)
        x1 = tl.load(x_at + 16, mask=x_ok, other=0.0).to(tl.float32)
        x2 = tl.load(x_at + 32, mask=x_ok, other=0.0).to(tl.float32)
        x3 = tl.load(x_at + 48, mask=x_ok, other=0.0).to(tl.float32)
        x4 = tl.load(x_at + 64, mask=x_ok, other=0.0).to(tl.float32)
        x5 = tl.load(x_at + 80, mask=x_ok, other=0.0).to(tl.float32)
        x6 = tl.load(x_at + 96, mask=x_ok, other=0.0).to(tl.float32)
        x7 = tl.load(x_at + 112, mask=x_ok, other=0.0).to(tl.float32)
        # a value built as 1 + q / 128 (or / 2048): the ones are taken off with the zero points
        if GROUP >= 128:
            group = block // (GROUP // 128)
            at = row * groups + group
            s = tl.load(scales_ptr + at, mask=row_ok & ok, other=0.0).to(tl.float32)
            z = tl.load(zeros_ptr + at, mask=row_ok & ok, other=0.0).to(tl.float32)
            high_sum = f0[None] * x0 + f2[None] * x2 + f4[None] * x4 + f6[None] * x6 + f7[None] * x7
            low_sum = f1[None] * x1 + f3[None] * x3 + f5[None] * x5
            x_high = x0 + x2 + x4 + x6 + x7
            x_low = x1 + x3 + x5
            ones = x_high * 128.0 + x_low * 2048.0
            total = high_sum * 128.0 + low_sum * 2048.0 - ones - z[None] * (x_high + x_low)
            acc += total * s[None]
        else:
            per_block = 128 // GROUP
            at = row * groups + block * per_block
            for part in tl.static_range(per_block):
                s = tl.load(scales_ptr + at + part, mask=row_ok & ok, other=0.0).to(tl.float32)
                z = tl.load(zeros_ptr + at + part, mask=row_ok & ok, other=0.0).to(tl.float32)
                if per_block == 2:
                    if part == 0:
                        value = (f0[None] * x0 + f2[None] * x2 - x0 - x2) * 128.0 + (
                            f1[None] * x1 + f3[None] * x3 - x1 - x3
                        ) * 2048.0
                        value -= z[None] * (x0 + x1 + x2 + x3)
                    else:
                        value = (f4[None] * x4 + f6[None] * x6 + f7[None] * x7 - x4 - x6 - x7) * 128.0 + (
                            f5[None] * x5 - x5
                        ) * 2048.0
                        value -= z[None] * (x4 + x5 + x6 + x7)
                else:
                    if part == 0:
                        value = (f0[None] * x0 - x0) * 128.0 + (f1[None] * x1 - x1) * 2048.0
                        value -= z[None] * (x0 + x1)
                    elif part == 1:
                        value = (f2[None] * x2 - x2) * 128.0 + (f3[None] * x3 - x3) * 2048.0
                        value -= z[None] * (x2 + x3)
                    elif part == 2:
                        value = (f4[None] * x4 - x4) * 128.0 + (f5[None] * x5 - x5) * 2048.0
                        value -= z[None] * (x4 + x5)
                    else:
                        value = (f6[None] * x6 + f7[None] * x7 - x6 - x7) * 128.0 - z[None] * (x6 + x7)
                acc += value * s[None]
    sums = tl.sum(tl.sum(acc, axis=3), axis=2)
    if HAS_BIAS and SPLIT == 1:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    m_out = tl.arange(0, M)[:, None]
    out_at = out_ptr + (split * M + m_out) * N + n[None, :]
    tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=n[None, :] < N)


@triton.jit
def _tile_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    M, N, K,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    j = tl.arange(0, 16)
    num_blocks = K // 128
    per_split = tl.cdiv(num_blocks, SPLIT)
    first = split * per_split
    last = tl.minimum(first + per_split, num_blocks)
    groups = K // GROUP
    n_ok = n < N
    x_ok = (m < M)[:, None]
    dtype = x_ptr.dtype.element_ty
    # a nibble in the lowest bits of this constant's mantissa is the constant plus the nibble
    built_on = 128.0 if dtype == tl.bfloat16 else 1024.0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        w = tl.load(
            words_ptr + n[None, :].to(tl.int64) * (K // 8) + block * 16 + j[:, None],
            mask=n_ok[None, :],
            other=0,
        )
        x_at = x_ptr + m[:, None] * K + block * 128 + j[None, :]
        group_dots = 8 if GROUP >= 128 else GROUP // 16
        for part in tl.static_range(8 // group_dots):
            value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            x_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
            for k in tl.static_range(group_dots):
                i = part * group_dots + k
                x = tl.load(x_at + 16 * i, mask=x_ok, other=0.0)
                q = ((w >> (4 * i)) & 15).to(tl.uint16)
                if dtype == tl.bfloat16:
                    weight = (q | 0x4300).to(tl.bfloat16, bitcast=True)
                else:
                    weight = (q | 0x6400).to(tl.float16, bitcast=True)
                value = tl.dot(x, weight, value)
                x_sum += tl.sum(x.to(tl.float32), axis=1)
            at = (
                n * groups + block // (GROUP // 128)
                if GROUP >= 128
                else n * groups + block * (128 // GROUP) + part
            )
            s = tl.load(scales_ptr + at, mask=n_ok, other=0.0).to(tl.float32)
            z = tl.load(zeros_ptr + at, mask=n_ok, other=0.0).to(tl.float32) + built_on
            acc += (value - x_sum[:, None] * z[None, :]) * s[None, :]
    if HAS_BIAS and SPLIT == 1:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + (split * M + m[:, None]) * N + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=x_ok & n_ok[None, :])


@triton.jit
def _sum_splits_kernel(
    parts_ptr, bias_ptr, out_ptr, MN, N, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < MN
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + split * MN + at, mask=ok, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % N, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _dequantize_kernel(
    words_ptr, scales_ptr, zeros_ptr, out_ptr, N, K, GROUP: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    block = tl.program_id(1)
    j = tl.arange(0, 16)[None, :]
    ok = n < N
    groups = K // GROUP
    w = tl.load(words_ptr + n.to(tl.int64) * (K // 8) + block * 16 + j, mask=ok, other=0)
    for i in tl.static_range(8):
        group = block // (GROUP // 128) if GROUP >= 128 else block * (128 // GROUP) + (16 * i) // GROUP
        s = tl.load(scales_ptr + n * groups + group, mask=ok, other=0.0).to(tl.float32)
        z = tl.load(zeros_ptr + n * groups + group, mask=ok, other=0.0).to(tl.float32)
        value = (((w >> (4 * i)) & 15).to(tl.float32) - z) * s
        out_at = out_ptr + n.to(tl.int64) * K + block * 128 + 16 * i + j
        tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=ok)


@lru_cache(maxsize=1024)
def choose(m: int, n: int, k: int) -> tuple[str, Tuning]:
    """Which kernel, cut how (measured: see benchmarks/NOTES.md, "int4 products")."""
    blocks = k // BLOCK
    if m <= 4:
        wide = n >= 16384
        return "rows", Tuning(block_n=8 if wide else 4, blocks=8, split=1, warps=4)
    programs = -(-n // 64)
    split = max(1, min(blocks // 4, -(-264 // programs)))
    return "tile", Tuning(block_n=64, blocks=1, split=split, warps=4, stages=4)


def int4_matmul(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    *,
    plan: tuple[str, Tuning] | None = None,
) -> Tensor:
    """x [M, K] (float16 or bfloat16, M <= 64) times the int4 matrix [N, K] -> [M, N] in the dtype of x.

    Args:
        words: int32 [N, K / 8], as `pack_words` makes them.
        scales, zeros: [N, K / group_size] of a float dtype; group sizes 32, 64, 128 or multiples of 128.
        plan: overrides the measured choice (for tuning).
    """
    m, k = x.shape
    n = words.shape[0]
    group = k // scales.shape[1]
    kind, tuning = plan or choose(m, n, k)
    x = x.contiguous()
    split = tuning.split
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    target = out if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    bias_arg = bias if bias is not None else x
    grid = (triton.cdiv(n, tuning.block_n), split)
    if kind == "rows":
        rows = triton.next_power_of_2(m)
        if rows != m:
            x = torch.nn.functional.pad(x, (0, 0, 0, rows - m))
            target = torch.empty(
                (split, rows, n), dtype=torch.float32 if split > 1 else x.dtype, device=x.device
            )
        _rows_kernel[grid](
            x, words, scales, zeros, bias_arg, target, n, k,
            M=rows, GROUP=group, HAS_BIAS=bias is not None, SPLIT=split,
            BLOCK_N=tuning.block_n, BLOCKS=tuning.blocks, num_warps=tuning.warps,
        )  # fmt: skip
        if rows != m:
            if split == 1:
                return target[0, :m]
            target = target[:, :m].contiguous()
    else:
        block_m = max(16, triton.next_power_of_2(m))
        _tile_kernel[grid](
            x, words, scales, zeros, bias_arg, target, m, n, k,
            GROUP=group, HAS_BIAS=bias is not None, SPLIT=split,
            BLOCK_M=block_m, BLOCK_N=tuning.block_n, STAGES=tuning.stages, num_warps=tuning.warps,
        )  # fmt: skip
    if split > 1:
        _sum_splits_kernel[(triton.cdiv(m * n, 1024),)](
            target, bias_arg, out, m * n, n, HAS_BIAS=bias is not None, SPLIT=split, BLOCK=1024
        )
    return out


def dequantize(words: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense matrix [N, K], for products of many rows."""
    n, k = words.shape[0], words.shape[1] * 8
    out = torch.empty((n, k), dtype=dtype, device=words.device)
    _dequantize_kernel[(triton.cdiv(n, 32), k // BLOCK)](
        words, scales, zeros, out, n, k, GROUP=k // scales.shape[1], BLOCK_N=32, num_warps=4
    )
    return out
