"""Products of a few rows with an int8 matrix that has one scale a row: its bytes are read once.

Two kernels, chosen by the number of rows: `_rows_kernel` multiplies on the ordinary float units, `_tile_kernel`
on the matrix units. Every integer of eight bits is a number of float16 and of bfloat16, so nothing is rounded
before the sum, which is float32 and scaled at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.launching import launch

BLOCK = 128
"""The inputs must be a multiple of this."""
MAX_ROWS = 64
"""More rows than this are for a dense product of dequantized blocks."""
_FEW_ROWS = 4


def int8_matmul_reference(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """float32 [M, N] in plain PyTorch: x [M, K], q int8 [N, K], scales [N]."""
    return (x.float() @ q.float().T) * scales.float()


@triton.jit
def _rows_kernel(
    x_ptr, q_ptr, scales_ptr, out_ptr, M, N, K,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((ROWS, BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        w = tl.load(
            q_ptr + n.to(tl.int64)[:, None] * K + at[None, :],
            mask=(n < N)[:, None] & (at < K)[None, :],
            other=0,
        ).to(tl.float32)
        x = tl.load(
            x_ptr + m[:, None] * K + at[None, :], mask=(m < M)[:, None] & (at < K)[None, :], other=0.0
        ).to(tl.float32)
        acc += x[:, None, :] * w[None, :, :]
    scale = tl.load(scales_ptr + n, mask=n < N, other=0.0)
    total = tl.sum(acc, axis=2) * scale[None, :]
    ok = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], total.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _tile_kernel(
    x_ptr, q_ptr, scales_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        w = tl.load(q_ptr + n.to(tl.int64)[None, :] * K + at[:, None], mask=(n < N)[None, :], other=0)
        x = tl.load(x_ptr + m[:, None] * K + at[None, :], mask=(m < M)[:, None], other=0.0)
        acc = tl.dot(x, w.to(x.dtype), acc)
    scale = tl.load(scales_ptr + n, mask=n < N, other=0.0)
    ok = (m < M)[:, None] & (n < N)[None, :]
    at_out = out_ptr + m[:, None] * N + n[None, :]
    tl.store(at_out, (acc * scale[None, :]).to(out_ptr.dtype.element_ty), mask=ok)


def int8_matmul(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] (float16 or bfloat16, M <= 64) times the int8 matrix [N, K] -> [M, N] in the dtype of x.

    Args:
        q: int8 [N, K], contiguous, K a multiple of 128.
        scales: float32 [N].
    """
    m, k = x.shape
    n = q.shape[0]
    x = x.contiguous()
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m <= _FEW_ROWS:
        block_n = 8
        launch(
            _rows_kernel, (triton.cdiv(n, block_n),),
            x, q, scales, out, m, n, k,
            ROWS=triton.next_power_of_2(m), BLOCK_N=block_n, BLOCK_K=512, num_warps=4,
        )  # fmt: skip
    else:
        block_n = 64
        launch(
            _tile_kernel, (triton.cdiv(n, block_n),),
            x, q, scales, out, m, n, k,
            BLOCK_M=max(16, triton.next_power_of_2(m)), BLOCK_N=block_n, BLOCK_K=BLOCK, num_warps=4,
            num_stages=4,
        )  # fmt: skip
    return out
