"""Linear maps. A layer may hold several of the checkpoint's matrices stacked along their outputs."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from huoyan.kernels import decode_kernels_enabled
from huoyan.layers.cpu import multiplies_bfloat16
from huoyan.layers.fused import silu_mul

_ALIGNED = 128
_WIDE = 1 << 14


class Linear(nn.Module):
    """x [..., in] @ weight [out, in].T + bias [out].

    `splits` are the output widths of the checkpoint's own matrices that are stacked in this one.
    """

    def __init__(self, width_in: int, splits: tuple[int, ...], *, bias: bool) -> None:
        super().__init__()
        self.width_in = width_in
        self.splits = splits
        self.weight = nn.Parameter(torch.empty(sum(splits), width_in))
        self.bias = nn.Parameter(torch.empty(sum(splits))) if bias else None
        self.whole: Tensor | None = None
        """The weight with rows of zeros behind it: see `lay_out_for_cuda`."""
        self.reordered: Tensor | None = None
        """The weight in oneDNN's order, in place of `weight`: see `lay_out_for_cpu`."""

    @property
    def gates(self) -> bool:
        """Whether it has what `gated` takes."""
        return self.bias is None and len(self.splits) == 2 and self.splits[0] == self.splits[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.reordered is not None:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.reordered, self.bias, "none", [], "")
            return out
        return nn.functional.linear(x, self.weight, self.bias)

    def without_bias(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(what `forward` gives for x [T, in] but for the bias, the bias that the reader is to add); or all of it, and
        None. `out` [T, out] may be written over.

        On CUDA only, where nothing is to be differentiated: torch asks cuBLAS anew for the best way of a product with
        a bias each time, and that takes the host longer (140 µs) than a GPU needs for the encoder's smaller products.
        """
        if self.bias is None or not x.is_cuda or torch.is_grad_enabled():
            return self(x), None
        if out is None:
            return torch.mm(x, self.weight.t()), self.bias
        return torch.mm(x, self.weight.t(), out=out), self.bias

    def padded(self, x: Tensor) -> Tensor:
        """What `forward` gives, in rows that may be wider than it is: see `lay_out_for_cuda`."""
        if self.whole is None:
            out: Tensor = self(x)
            return out
        return nn.functional.linear(x, self.whole)[:, : len(self.weight)]

    def parts(self, x: Tensor, over: Tensor | None = None) -> Tensor:
        """What `forward` gives, or for a step's decodes on CUDA what may be ready sooner: float32 [S, T, out], to be
        summed and given the bias by whoever reads it. `over` [T, out] may be written over."""
        if not reads_few_rows(x, self.width_in):
            if _reads_some_rows(x, self.weight):
                from huoyan.kernels.wide_matmul import wide_matmul

                found = wide_matmul(x, self.weight)
                return found if self.bias is None or found.dim() == 3 else found + self.bias
            return self._over(x, over)
        from huoyan.kernels.dense_matmul import dense_matmul

        return dense_matmul(x, self.weight, self.bias, parts=True)

    def _over(self, x: Tensor, over: Tensor | None) -> Tensor:
        if self.bias is not None or not may_be_over(x, over, len(self.weight)):
            whole: Tensor = self(x)
            return whole
        return torch.mm(x, self.weight.t(), out=over)

    def gated(self, x: Tensor) -> Tensor:
        """silu(a) * b, of two matrices of equal widths without bias: [T, in] -> [T, out / 2]."""
        if not reads_few_rows(x, self.width_in):
            if _reads_some_rows(x, self.weight, gated=True):
                from huoyan.kernels.wide_matmul import wide_matmul

                return wide_matmul(x, self.weight, gated=True)
            return silu_mul(self(x))
        from huoyan.kernels.dense_matmul import dense_matmul

        return dense_matmul(x, self.weight, gated=True)

    def in_float32(self, x: Tensor) -> Tensor:
        """The result in float32."""
        if self.bias is not None or not reads_few_rows(x, self.width_in):
            out: Tensor = self(x).float()
            return out
        from huoyan.kernels.dense_matmul import dense_matmul

        return dense_matmul(x, self.weight, dtype=torch.float32)


def may_be_over(x: Tensor, over: Tensor | None, width_out: int) -> bool:
    """Whether a product of x [T, in] can be, and is better, written to `over`: on CUDA, where nothing is to be
    differentiated."""
    if over is None or not x.is_cuda or torch.is_grad_enabled():
        return False
    return over.dtype == x.dtype and over.shape == (len(x), width_out)


def reads_few_rows(x: Tensor, width_in: int) -> bool:
    """Whether our kernel is the way of x [T, in] through a dense matrix: a decode step's rows, on CUDA."""
    if not (x.is_cuda and x.dim() == 2 and x.dtype in (torch.float16, torch.bfloat16)):
        return False
    if not decode_kernels_enabled() or torch.is_grad_enabled() or not x.is_contiguous():
        return False
    from huoyan.kernels.dense_matmul import BLOCK_K, MAX_ROWS

    return len(x) <= MAX_ROWS and width_in % BLOCK_K == 0


def _reads_some_rows(x: Tensor, weight: Tensor, gated: bool = False) -> bool:
    """The same of more rows, and `huoyan.kernels.wide_matmul`."""
    if not x.is_cuda or not decode_kernels_enabled():
        return False
    from huoyan.kernels.wide_matmul import takes

    return takes(x, weight, gated)


def gelu_of(linear: nn.Module, x: Tensor) -> Tensor:
    """The tanh form of GELU of what a linear map gives for x [T, in]."""
    bias = linear.bias if isinstance(linear, Linear) else None
    if bias is not None and x.is_cuda and not torch.is_grad_enabled() and product_takes_gelu():
        weight = cast(Linear, linear).weight
        fused: Tensor = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
        return fused
    wide: Tensor = linear(x)
    if torch.is_grad_enabled():
        return nn.functional.gelu(wide, approximate="tanh")
    # The widest tensor of the encoder: written over.
    return torch.ops.aten.gelu_(wide, approximate="tanh")  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def product_takes_gelu() -> bool:
    """Whether torch's product with a GELU behind it is there on CUDA, and is the tanh form, tried on a few numbers:
    cuBLAS then makes it of the sums, before they are rounded and written."""
    try:
        x = torch.linspace(-4, 4, 64 * 64, device="cuda").view(64, 64).half()
        weight, bias = torch.eye(64, device="cuda").half(), torch.zeros(64, device="cuda").half()
        got = torch._addmm_activation(bias, x, weight, use_gelu=True).float()
        want = nn.functional.gelu(x.float(), approximate="tanh")
        # Rounding to 16 bits is off by less than this, the exact form by more.
        near = x.float().abs() < 2.5
        return bool(torch.allclose(got[near], want[near], rtol=6e-4, atol=5e-5))
    except Exception:
        return False


def lay_out_for_cpu(model: nn.Module) -> None:
    """Store weights on a CPU as its products like them; results stay as they are.

    Wide float32 weights lie input by input: MKL multiplies a few rows with `[in, out]` in memory up to three times as
    fast as with `[out, in]` where there are more outputs than inputs. bfloat16 weights are put into oneDNN's own order
    where the processor multiplies bfloat16: it would do that at each product, which takes a few rows twice as long.
    Then `weight` is empty. Weights that another module shares are left alone.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for layer in layers:
        weight = layer.weight
        if weight.device.type != "cpu" or shared[id(weight)] > 1 or not weight.numel():
            continue
        if weight.dtype is torch.float32 and weight.shape[0] > weight.shape[1]:
            weight.data = weight.data.t().contiguous().t()
        elif weight.dtype is torch.bfloat16 and multiplies_bfloat16():
            layer.reordered = torch.ops.mkldnn._reorder_linear_weight(weight.data)
            weight.data = weight.new_empty(0, layer.width_in)


def lay_out_for_cuda(linear: nn.Module) -> None:
    """Give a wide matrix of an odd number of rows some more, of zeros, in the memory behind them.

    cuBLAS has its fast kernels for outputs whose rows begin on 16 bytes: of the published head (151666 rows) it makes
    a product of 128 rows twice as fast so. A weight that another module shares is left alone.
    """
    if not isinstance(linear, Linear) or linear.bias is not None or linear.whole is not None:
        return
    rows, columns = linear.weight.shape
    if linear.weight.device.type != "cuda" or rows % _ALIGNED == 0 or rows < _WIDE:
        return
    whole = linear.weight.new_zeros(-(-rows // _ALIGNED) * _ALIGNED, columns)
    whole[:rows] = linear.weight.data
    linear.weight.data = whole[:rows]
    linear.whole = whole
