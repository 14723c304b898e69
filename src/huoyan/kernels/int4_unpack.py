"""Int4 weights as numbers: in the registers of the kernels that multiply them, or some rows as a dense matrix. See
`huoyan.kernels.int4_words` for how they lie."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.int4_words import BLOCK
from huoyan.kernels.launching import launch


@triton.constexpr_function
def _pair_code(bf16: bool, high: bool, scaled: bool) -> str:
    """The assembly of `_pair`: $2 words, $3 what is added, $4 the scale."""
    if bf16:
        # m: 128.0; s: 1.0; z: -0.0.
        registers, mask, constants = "t, m, s, z", "000f000f", "mov.b32 m, 0x43004300; mov.b32 s, 0x3f803f80;"
        constants += "mov.b32 z, 0x80008000;" if scaled else ""
        less, times = "fma.rn.bf16x2 t, t, s, $3;", "fma.rn.bf16x2 t, t, $4, z;"
    elif high:
        # m: 1024.0; s: 1 / 16.
        registers, mask, constants = "t, m, s", "00f000f0", "mov.b32 m, 0x64006400; mov.b32 s, 0x2c002c00;"
        less, times = "fma.rn.f16x2 t, t, s, $3;", "mul.rn.f16x2 t, t, $4;"
    else:
        registers, mask, constants = "t, m", "000f000f", "mov.b32 m, 0x64006400;"
        less, times = "add.f16x2 t, t, $3;", "mul.rn.f16x2 t, t, $4;"
    nibbles = f"lop3.b32 t, $2, 0x{mask}, m, 0xea;"
    return f"{{.reg .b32 {registers}; {constants} {nibbles} {less} {times if scaled else ''} mov.b32 {{$0, $1}}, t;}}"


@triton.jit
def _pair(w, zero, scale, HIGH: tl.constexpr, BF16: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr):
    """Of words, two nibbles less their zero point as two tensors of 16-bit numbers: those in bits 0 and 16, or if HIGH
    those in bits 4 and 20; times `scale` (in both halves) if SCALED.

    A nibble is put into the mantissa of a constant c, in the higher place as 16 times itself; there the sum is divided
    by 16. `zero`: in both halves minus (the zero point + c or c / 16). All of it but the scale is exact. bfloat16 has
    no room for the higher place. In assembly two or three instructions; the interpreter has none. A scale must be in
    the assembly: multiplied after it, ptxas has each product of the matrix units wait for the one before.
    """
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    if ASM:
        CODE: tl.constexpr = _pair_code(BF16, HIGH, SCALED)
        if SCALED:
            low, high = tl.inline_asm_elementwise(
                CODE, "=h,=h,r,r,r", [w, zero, scale], dtype=(dtype.value, dtype.value), is_pure=True, pack=1
            )
        else:
            low, high = tl.inline_asm_elementwise(
                CODE, "=h,=h,r,r", [w, zero], dtype=(dtype.value, dtype.value), is_pure=True, pack=1
            )
    else:
        BITS: tl.constexpr = 0x4300 if BF16 else 0x6400
        MASK: tl.constexpr = 0xF0 if HIGH else 0xF
        PART: tl.constexpr = 0.0625 if HIGH else 1.0
        less = zero.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        low = ((w & MASK) | BITS).to(tl.int16).to(dtype, bitcast=True)
        high = (((w >> 16) & MASK) | BITS).to(tl.int16).to(dtype, bitcast=True)
        low = (low.to(tl.float32) * PART + less).to(dtype)
        high = (high.to(tl.float32) * PART + less).to(dtype)
        if SCALED:
            times = scale.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            low = (low.to(tl.float32) * times).to(dtype)
            high = (high.to(tl.float32) * times).to(dtype)
    return low, high


@triton.jit
def _spread(meta, WIDTH: tl.constexpr):
    """[N, groups] -> [N, WIDTH]"""
    N: tl.constexpr = meta.shape[0]
    GROUPS: tl.constexpr = meta.shape[1]
    return tl.reshape(tl.broadcast_to(meta[:, :, None], (N, GROUPS, WIDTH // GROUPS)), (N, WIDTH))


@triton.jit
def _less(meta, CONSTANT: tl.constexpr, BF16: tl.constexpr):
    """Minus (a constant + the zero point of `meta`), in both halves."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    BUILT_ON: tl.constexpr = 128.0 if BF16 else 1024.0
    zero = (meta >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    bits = (BUILT_ON - CONSTANT - zero).to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def unpacked(w, meta, BF16: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr):
    """Words [N, 16] and their groups' numbers, int32 [N, groups] -> weights [N, 128], without scales if not SCALED."""
    N: tl.constexpr = w.shape[0]
    CONSTANT: tl.constexpr = 128.0 if BF16 else 1024.0
    less = _spread(_less(meta, CONSTANT, BF16), 16)
    scale = meta & 0xFFFF
    scale = _spread(scale | (scale << 16), 16)
    shifted = w >> 8
    low0, high0 = _pair(w, less, scale, False, BF16, SCALED, ASM)
    low2, high2 = _pair(shifted, less, scale, False, BF16, SCALED, ASM)
    if BF16:
        low1, high1 = _pair(w >> 4, less, scale, False, BF16, SCALED, ASM)
        low3, high3 = _pair(w >> 12, less, scale, False, BF16, SCALED, ASM)
    else:
        less_high = _spread(_less(meta, CONSTANT / 16, BF16), 16)
        low1, high1 = _pair(w, less_high, scale, True, BF16, SCALED, ASM)
        low3, high3 = _pair(shifted, less_high, scale, True, BF16, SCALED, ASM)
    # [N, word, b, e] for h = 0 and 1, then [N, word, b, e, h]
    first = tl.join(tl.join(low0, high0), tl.join(low1, high1))
    second = tl.join(tl.join(low2, high2), tl.join(low3, high3))
    apart = tl.reshape(tl.join(first, second), (N, 4, 4, 2, 2, 2))  # N, run, c, b, e, h
    return tl.reshape(tl.permute(apart, (0, 1, 5, 4, 2, 3)), (N, 128))


@triton.jit
def load_meta(meta_ptr, n, n_ok, width, block, GROUP: tl.constexpr):
    """int32 [N, groups of a block]"""
    if GROUP >= 128:
        at = (block // (GROUP // 128)) * width + n[:, None]
    else:
        GROUPS: tl.constexpr = 128 // GROUP
        at = (block * GROUPS + tl.arange(0, GROUPS)[None, :]) * width + n[:, None]
    return tl.load(meta_ptr + at, mask=n_ok[:, None], other=0)


@triton.jit
def _dequantize_kernel(
    words_ptr, meta_ptr, out_ptr, rows, first_row, width, K,
    GROUP: tl.constexpr, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    ok = row < rows
    n = first_row + row
    if PAIRED:
        other = n // (width // 2)
        own = n - other * (width // 2)
        n = own // 32 * 64 + other * 32 + own % 32
    tile = words_ptr + (n // 64)[:, None].to(tl.int64) * (K * 8) + block * 1024
    w = tl.load(tile + (n % 64)[:, None] * 16 + tl.arange(0, 16)[None, :], mask=ok[:, None], other=0)
    meta = load_meta(meta_ptr, n, ok, width, block, GROUP)
    BF16: tl.constexpr = out_ptr.dtype.element_ty == tl.bfloat16
    weight = unpacked(w, meta, BF16, True, ASM)
    out_at = out_ptr + row[:, None].to(tl.int64) * K + block * 128 + tl.arange(0, 128)[None, :]
    tl.store(out_at, weight, mask=ok[:, None])


def dequantize(
    words: Tensor, meta: Tensor, start: int, stop: int, out: Tensor, *, pairs: bool = False
) -> Tensor:
    """Rows start to stop of the dense matrix, for products of many rows; `out` [stop - start, K], filled.

    `pairs`: they are `paired`; rows are counted as they were before.
    """
    width, k = meta.shape[1], words.shape[1] * BLOCK
    launch(
        _dequantize_kernel, (triton.cdiv(stop - start, 64), k // BLOCK),
        words, meta, out, stop - start, start, width, k,
        GROUP=k // meta.shape[0], PAIRED=pairs, BLOCK_N=64, ASM=words.is_cuda, num_warps=4,
    )  # fmt: skip
    return out
