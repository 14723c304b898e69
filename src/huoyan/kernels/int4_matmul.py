"""Products of up to some hundred rows with an int4 matrix, unpacked in registers and multiplied on the matrix units.

The matrix is the left operand, outputs by inputs, because that one the matrix units take from registers: nothing of
it is written anywhere after it was read. Its layout is made for that. Inputs are taken in runs of 32, which are four
words; word c of a run holds, in its nibble h * 2 + e + 4 * b (from the lowest), input 16 h + 8 e + 2 c + b of the run.
These are the inputs that one thread multiplies, and the two of a pair (b) stand where two 16-bit numbers stand: a
shift, a mask and a subtraction unpack both at once. `words` int32 [N / 64, K / 128, 64, 16]: what a program reads at a
time are 64 outputs of 128 inputs, 4 KiB end to end (rows of 64 bytes, far apart, were read half as fast).

`meta` int32 [K / group_size, N] holds a group's scale in the lower and its zero point in the upper 16 bits, both as
numbers of the dtype, the zero point on top of the same constant that nibbles are built on.

A gate and what it gates, two matrices of as many outputs, are one whose outputs are `paired`: 32 of the gate, then the
same 32 of the other, and so on. So a program has both of a pair, and writes their product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from huoyan.kernels.arrivals import arrivals
from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, prefetch_lines, wait

BLOCK = 128
"""Inputs that are multiplied at a time; their number must be a multiple of it."""
TILE = 64
"""Outputs that stand together."""
PAIR = TILE // 2
"""Outputs of a gate that stand together where they are paired; their number must be a multiple of it."""
MAX_ROWS = 192
"""More rows than this are for a dense product of the dequantized matrix."""
_BUILT_ON = {torch.float16: 1024.0, torch.bfloat16: 128.0}
"""A nibble in the lowest bits of this number's mantissa is the number plus the nibble."""


def paired(rows: Tensor) -> Tensor:
    """[2 W, …], those of a gate and then those it gates, in the order above."""
    ordered: Tensor = rows.unflatten(0, (2, -1, PAIR)).transpose(0, 1).flatten(0, 2)
    return ordered


def unpaired(rows: Tensor) -> Tensor:
    """The inverse of `paired`."""
    ordered: Tensor = rows.unflatten(0, (-1, 2, PAIR)).transpose(0, 1).flatten(0, 2)
    return ordered


def pack_words(q: Tensor) -> Tensor:
    """uint8 [N, K] of values 0 to 15, K a multiple of 128 -> int32 [N / 64, K / 128, 64, 16] in the layout above.

    N is rounded up to a multiple of 64, with zeros.
    """
    rows = -(-q.shape[0] // TILE) * TILE
    words = torch.zeros(rows, q.shape[1] // 8, dtype=torch.int32, device=q.device)
    runs = q.unflatten(1, (-1, 2, 2, 4, 2))  # N, run, h, e, c, b
    filled = words[: q.shape[0]].unflatten(1, (-1, 4))
    for h in range(2):
        for e in range(2):
            for b in range(2):
                filled |= runs[:, :, h, e, :, b].to(torch.int32) << 4 * (2 * h + e + 4 * b)
    tiles: Tensor = words.unflatten(1, (-1, 16)).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()
    return tiles


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of `pack_words`: uint8 [N, K], the rows that fill the last tile included."""
    runs = words.transpose(1, 2).flatten(2).flatten(0, 1).unflatten(1, (-1, 4))
    out = torch.empty(*runs.shape[:2], 2, 2, 4, 2, dtype=torch.uint8, device=words.device)
    for h in range(2):
        for e in range(2):
            for b in range(2):
                out[:, :, h, e, :, b] = ((runs >> 4 * (2 * h + e + 4 * b)) & 15).to(torch.uint8)
    return out.flatten(1)


def pack_meta(scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales and zero points (whole numbers, 0 to 16) [N, K / group_size] -> int32 [K / group_size, N]."""
    low = scales.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
    high = (zeros.float() + _BUILT_ON[dtype]).to(dtype).view(torch.int16).to(torch.int32) << 16
    return (low | high).T.contiguous()


def unpack_meta(meta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_meta`: scales and zero points of `dtype`, [N, K / group_size]."""
    low, high = ((meta >> shift).to(torch.int16).view(dtype).T.contiguous() for shift in (0, 16))
    return low, high - _BUILT_ON[dtype]


def dequantize_reference(words: Tensor, meta: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [N, K]; `dtype`: of the numbers in `meta`."""
    scales, zeros = (part.float().unsqueeze(-1) for part in unpack_meta(meta, dtype))
    q = unpack_words(words)[: meta.shape[1]].unflatten(1, (meta.shape[0], -1)).float()
    weight: Tensor = (q - zeros) * scales
    return weight.flatten(1)


def int4_matmul_reference(x: Tensor, words: Tensor, meta: Tensor, gated: bool = False) -> Tensor:
    """float32 [M, N] in plain PyTorch; `gated`: see `int4_matmul`."""
    weight = dequantize_reference(words, meta, x.dtype)
    if not gated:
        return x.float() @ weight.T
    gate, up = (x.float() @ unpaired(weight).T).chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


@dataclass(frozen=True)
class Tuning:
    """How one shape is cut: outputs and rows of a program, programs that share the inputs, blocks fetched ahead of the
    wait; whether weights are scaled before they are multiplied, and not their sums."""

    block_n: int
    split: int
    warps: int
    stages: int
    prefetch: int = 0
    block_m: int = 16
    scaled: bool = False
    unroll: int = 1
    tiles: bool = False
    """Rows come by the tensor memory unit (Hopper): no addresses of theirs in registers, no masks."""
    registers: int | None = None
    """The most a thread may have, so that as many programs fit a processor as shared memory allows."""
    wave: int = 0
    """Programs a processor has room for at a time: tiles that do not fill the last round are shared out, see `tail`."""
    tail: int = 1
    """Programs that share the inputs of a tile of the last round; the last to come adds their sums, always in the same
    order."""


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
def _unpacked(w, meta, BF16: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr):
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
def _settled(acc, ASM: tl.constexpr):
    """Sums as they are, but used before the next block. Without that Triton halves a block's product so that the halves
    overlap, and ptxas, which cannot follow it, has every single instruction of the matrix units wait for the last."""
    if ASM:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def _load_meta(meta_ptr, n, n_ok, width, block, GROUP: tl.constexpr):
    """int32 [N, groups of a block]"""
    if GROUP >= 128:
        at = (block // (GROUP // 128)) * width + n[:, None]
    else:
        GROUPS: tl.constexpr = 128 // GROUP
        at = (block * GROUPS + tl.arange(0, GROUPS)[None, :]) * width + n[:, None]
    return tl.load(meta_ptr + at, mask=n_ok[:, None], other=0)


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
    UNROLL: tl.constexpr, TILES: tl.constexpr, TAIL: tl.constexpr,
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
    for block in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
        w = _load_words(words_at + block * 1024, n_ok, EVEN)
        if TILES:
            x = tl.trans(x_tiles.load([first_m, block * 128]))
        else:
            x = tl.trans(tl.load(x_at + block * 128, mask=x_ok, other=0.0))
        meta = _load_meta(meta_ptr, n, n_ok, N, block, GROUP)
        weight = _unpacked(w, meta, BF16, SCALED, ASM)
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
    meta = _load_meta(meta_ptr, n, ok, width, block, GROUP)
    BF16: tl.constexpr = out_ptr.dtype.element_ty == tl.bfloat16
    weight = _unpacked(w, meta, BF16, True, ASM)
    out_at = out_ptr + row[:, None].to(tl.int64) * K + block * 128 + tl.arange(0, 128)[None, :]
    tl.store(out_at, weight, mask=ok[:, None])


@lru_cache(maxsize=1024)
def choose(m: int, n: int, k: int, parts: bool = False, roomy: bool = True) -> Tuning:
    """How a product is cut (searched, each cut in its place in a step, by `benchmarks/decode_step.py`).

    `parts`: whether inputs may be shared out among programs whose sums the next kernel adds; `roomy`: see `_is_roomy`.
    """
    if m > 128 or (m > 16 and not roomy):
        split = max(1, min(k // BLOCK // 4, 7 if m <= 64 else 4)) if parts and n < 16384 else 1
        if split == 1 or n > k:
            return Tuning(64, split, warps=4, stages=3, block_m=64)
        return Tuning(128, split, warps=4, stages=4, block_m=64)
    if m > 16:
        return _choose_many(m <= 64, n, k, parts)
    if n >= 16384:
        return Tuning(128, 1, warps=4, stages=4, prefetch=4, wave=2, tail=4)
    if not parts:
        return Tuning(64, 1, warps=4, stages=4, prefetch=4)
    # A program for each processor and more; what reads the parts reads few outputs of each.
    split = max(1, min(k // BLOCK // 4, 7 if k < 8192 else 14))
    return Tuning(128, split, warps=4, stages=4, prefetch=4)


def _choose_many(few: bool, n: int, k: int, parts: bool) -> Tuning:
    """Of 17 to 64 rows, or else to 128, where shared memory has room for three stages of them."""
    whole = partial(Tuning, block_m=64 if few else 128, scaled=True, tiles=True)
    if n >= 16384:
        # As many programs at a time as there is room for, and the last round shared out.
        return (
            whole(128, 1, 8, 4, wave=2, tail=4)
            if few
            else whole(128, 1, 8, 2, prefetch=4, registers=128, wave=2, tail=4)
        )
    if not parts:
        return whole(64, 1, 4, 3 if few else 2)
    most = max(1, k // BLOCK // 4)
    if n > k:
        return whole(64, min(4, most), 4, 3 if few else 2, prefetch=4)
    if few:
        return whole(64, min(7, most), 4, 3, prefetch=4 if k >= 8192 else 0)
    return whole(128, min(4, most), 4, 3)


@lru_cache(maxsize=16)
def _is_roomy(device: torch.device) -> bool:
    """Whether a program may have more than 100 KiB of shared memory, and tiles by the tensor memory unit: data centres'
    GPUs from Hopper on; the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


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
        x: float16 or bfloat16, contiguous, K a multiple of 128; M at most MAX_ROWS.
        meta: of numbers of x's dtype.
        bias: [N], not of parts.
        parts: where it is faster, give float32 [S, M, N], to be summed by whoever reads it.
        gated: the matrix's outputs are `paired`, which has neither bias nor parts: gives silu(gate) * other [M, N / 2].

    Returns:
        [M, N] in the dtype of x, or parts.
    """
    out, grid, operands, options = _launch(x, words, meta, bias, parts, gated, tuning)
    _matmul_kernel[grid](*operands, **options)
    return out


def compile_ahead(
    x: Tensor, words: Tensor, meta: Tensor, *, parts: bool, gated: bool = False, tuning: Tuning
) -> None:
    """Compile what `int4_matmul` would launch, for searches; other threads may do the same."""
    _, grid, operands, options = _launch(x, words, meta, None, parts, gated, tuning)
    _matmul_kernel.warmup(*operands, grid=grid, **options)


def _launch(
    x: Tensor,
    words: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    parts: bool,
    gated: bool,
    tuning: Tuning | None,
) -> tuple[Tensor, tuple[int, int, int], tuple[Any, ...], dict[str, Any]]:
    """The result, not yet filled, and what fills it: a grid, operands and options of the kernel."""
    m, k = x.shape
    n = meta.shape[1]
    group = k // meta.shape[0]
    tuning = tuning or choose(m, n, k, parts, _is_roomy(x.device))
    split = tuning.split
    if split > 1:
        out = torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    else:
        out = torch.empty((m, n // 2 if gated else n), dtype=x.dtype, device=x.device)
    overlap = x.is_cuda and overlaps()
    programs = whole = triton.cdiv(n, tuning.block_n)
    tail, late, arrived = 1, out, out
    over = programs % (tuning.wave * _processors(x.device)) if tuning.wave else 0
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
    operands = (
        x, TensorDescriptor(x, [m, k], [k, 1], [tuning.block_m, BLOCK]) if tiles else x, words, meta,
        x if bias is None else bias, out, late, arrived, m, n, k, whole,
    )  # fmt: skip
    options = dict(
        GROUP=group, HAS_BIAS=bias is not None, GATED=gated, SPLIT=split, SCALED=group < BLOCK or tuning.scaled,
        EVEN=n % tuning.block_n == 0, BLOCK_M=tuning.block_m, BLOCK_N=tuning.block_n, STAGES=tuning.stages,
        PREFETCH=tuning.prefetch if overlap else 0, UNROLL=tuning.unroll, TILES=tiles, TAIL=tail,
        ASM=x.is_cuda, OVERLAP=overlap, num_warps=tuning.warps, **launch_options(overlap),
    )  # fmt: skip
    if x.is_cuda and tuning.registers:
        options["maxnreg"] = tuning.registers
    return out, (programs, split, triton.cdiv(m, tuning.block_m)), operands, options


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def dequantize(
    words: Tensor, meta: Tensor, start: int, stop: int, out: Tensor, *, pairs: bool = False
) -> Tensor:
    """Rows start to stop of the dense matrix, for products of many rows; `out` [stop - start, K], filled.

    `pairs`: they are `paired`; rows are counted as they were before.
    """
    width, k = meta.shape[1], words.shape[1] * BLOCK
    _dequantize_kernel[(triton.cdiv(stop - start, 64), k // BLOCK)](
        words, meta, out, stop - start, start, width, k,
        GROUP=k // meta.shape[0], PAIRED=pairs, BLOCK_N=64, ASM=words.is_cuda, num_warps=4,
    )  # fmt: skip
    return out
