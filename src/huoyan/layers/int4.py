"""Linear maps with int4 weights: each group of inputs of an output row has its own scale and zero point."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from huoyan.kernels import decode_kernels_enabled
from huoyan.layers import int4_cpu
from huoyan.layers.blocks import gated_by_blocks, linear_by_blocks
from huoyan.layers.fused import silu_mul
from huoyan.layers.linear import may_be_over
from huoyan.planning.pieces import FEW_ROWS, dense_rows, up_columns


@dataclass(frozen=True)
class Int4Weight:
    """A weight matrix as integers: w[o, i] = (q[o, i] - zeros[o, g]) * scales[o, g], g = i // group_size.

    q is uint8 [out, in] with values 0 to 15; scales and zeros are float32 [out, in / group_size].
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        grouped = self.q.unflatten(1, (self.scales.shape[1], -1)).float()
        weight: Tensor = (grouped - self.zeros.unsqueeze(-1)) * self.scales.unsqueeze(-1)
        return weight.flatten(1)


def stack(weights: list[Int4Weight]) -> Int4Weight:
    """Weights of the same inputs, stacked along their outputs; finer groups win where they differ."""
    group = min(w.group_size for w in weights)
    weights = [_regroup(w, group) for w in weights]
    return Int4Weight(
        torch.cat([w.q for w in weights]),
        torch.cat([w.scales for w in weights]),
        torch.cat([w.zeros for w in weights]),
    )


def _regroup(weight: Int4Weight, group_size: int) -> Int4Weight:
    """The same weight with smaller groups (a divisor of its own)."""
    repeat = weight.group_size // group_size
    if repeat == 1:
        return weight
    return Int4Weight(
        weight.q, weight.scales.repeat_interleave(repeat, 1), weight.zeros.repeat_interleave(repeat, 1)
    )


class Int4Linear(nn.Module):
    """x [..., in] @ dequantized(weight).T + bias, the weight held in four bits.

    The weight is packed once, for the device and dtype it is built with: in the form of torch's int4 product
    (a CPU in bfloat16), in that of our kernels (CUDA), else two values to a byte, multiplied by dequantizing a
    block of rows at a time. No path keeps a 16-bit copy.
    """

    packed: Tensor
    meta: Tensor
    """Of our kernels, scales and zero points together."""
    pairs = False
    """Whether our kernels have the outputs of a gate and what it gates side by side."""
    scales: Tensor
    zeros: Tensor

    def __init__(
        self,
        weight: Int4Weight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        gated: bool = False,
    ) -> None:
        """`gated`: the matrix is a gate's rows and then as many others, for `gated`."""
        super().__init__()
        self.width_out, self.width_in = weight.q.shape
        self.bias = None if bias is None else nn.Parameter(bias.to(device, dtype), requires_grad=False)
        self.packing = packing_for(weight, device, dtype)
        if self.packing == "cpu":
            weight = _regroup(weight, max(g for g in int4_cpu.GROUPS if weight.group_size % g == 0))
            packed = int4_cpu.pack(weight.q)
            offset = (8 - weight.zeros) * weight.scales
            scales = torch.stack((weight.scales, offset), dim=-1).transpose(0, 1).contiguous()
        elif self.packing == "words":
            from huoyan.kernels.int4_words import PAIR, pack_meta, pack_words, paired

            self.group_size = weight.group_size
            self.pairs = gated and bias is None and self.width_out % (2 * PAIR) == 0
            q, scales, zeros = (t.to(device) for t in (weight.q, weight.scales, weight.zeros))
            if self.pairs:
                q, scales, zeros = paired(q), paired(scales), paired(zeros)
            self.register_buffer("packed", pack_words(q))
            self.register_buffer("meta", pack_meta(scales, zeros, dtype))
            return
        else:
            q = weight.q.to(device)
            packed, scales = q[:, 0::2] | (q[:, 1::2] << 4), weight.scales
        self.group_size = weight.group_size
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales.to(device, dtype))
        if self.packing != "cpu":
            self.register_buffer("zeros", weight.zeros.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.width_in)
        if self.packing == "cpu":
            out = int4_cpu.multiply(rows, self.packed, self.scales, self.bias)
        elif self.packing == "words":
            out = self._words(rows.contiguous())
        else:
            out = linear_by_blocks(rows, self.width_out, self.weight_rows, self.bias)
        return out.view(*x.shape[:-1], self.width_out)

    def parts(self, x: Tensor, over: Tensor | None = None) -> Tensor:
        """See `huoyan.layers.linear.Linear.parts`."""
        if self.packing == "words" and not self.pairs and self._by_kernel(x):
            return self._multiply(x, parts=True)
        if self.packing == "words" and self.bias is None and may_be_over(x, over, self.width_out):
            return linear_by_blocks(x, self.width_out, self._dense(x), out=over)
        whole: Tensor = self(x)
        return whole

    def gated(self, x: Tensor) -> Tensor:
        """See `huoyan.layers.linear.Linear.gated`."""
        if self.pairs and self._by_kernel(x):
            return self._multiply(x, gated=True)
        if self.packing == "words" and x.dim() == 2 and len(x) > FEW_ROWS:
            width = self.width_out // 2
            return gated_by_blocks(x, width, self._dense(x), up_columns(len(x), width))
        return silu_mul(self.parts(x), x.dtype)

    def _words(self, x: Tensor) -> Tensor:
        """The product with rows [T, in], where our kernels have packed the matrix."""
        if self._by_kernel(x) and not self.pairs:
            return self._multiply(x)
        return linear_by_blocks(x, self.width_out, self._dense(x), self.bias)

    def _multiply(self, x: Tensor, *, parts: bool = False, gated: bool = False) -> Tensor:
        """By the kernel."""
        from huoyan.kernels.int4_matmul import int4_matmul

        return int4_matmul(x, self.packed, self.meta, self.bias, parts=parts, gated=gated)

    def _by_kernel(self, x: Tensor) -> bool:
        """Whether the matrix need not be made dense for x."""
        from huoyan.kernels.int4_cuts import takes

        if x.dim() != 2 or not x.is_contiguous():
            return False
        return takes(len(x), self.width_out, self.width_in, x.device)

    def _dense(self, x: Tensor) -> Callable[[int, int], Tensor]:
        """Some rows of the matrix, in the stream's scratch, by our kernel; `x`: what they are to be multiplied with."""
        from huoyan.kernels.int4_unpack import dequantize

        def dense(start: int, stop: int) -> Tensor:
            out = _scratch(stop - start, self.width_in, x)
            return dequantize(self.packed, self.meta, start, stop, out, pairs=self.pairs)

        return dense

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the dense weight, from the bytes packing."""
        packed, part = self.packed[start:stop], slice(start, stop)
        q = torch.stack((packed & 15, packed >> 4), dim=-1).view(stop - start, -1, self.group_size)
        weight: Tensor = (q - self.zeros[part].unsqueeze(-1)) * self.scales[part].unsqueeze(-1)
        return weight.flatten(1)


_SCRATCHES: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}


def _scratch(rows: int, width: int, like: Tensor) -> Tensor:
    """[rows, width] in the dtype and on the device of `like`, for a moment: every product of a stream writes there.

    Kept, so that steps and the CUDA graphs of steps, whose memory is apart, have one between them. A graph is captured
    after the same has been run without, so this is never made while one is.
    """
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    key = like.device, like.dtype, stream
    found = _SCRATCHES.get(key)
    if found is None or found.numel() < rows * width:
        _SCRATCHES[key] = found = like.new_empty(rows * width)
    return found[: rows * width].view(rows, width)


def reserve_scratch(model: nn.Module, like: Tensor) -> None:
    """Make the current stream's scratch at once, as large as the model's matrices will want it; `like`: of what they
    are multiplied with."""
    sizes = [
        (dense_rows(module.width_out, module.width_in, True), module.width_in)
        for module in model.modules()
        if isinstance(module, Int4Linear) and module.packing == "words"
    ]
    if sizes:
        _scratch(*max(sizes, key=math.prod), like)


def forget_scratches(stream: int) -> None:
    """Give back those of a stream (its `cuda_stream`; 0 is the default one), whose graphs are not used any more."""
    for key in [key for key in _SCRATCHES if key[2] == stream]:
        del _SCRATCHES[key]


def packing_for(weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str:
    """How a weight is kept on a device: "cpu", "words" (our CUDA kernels) or "bytes" (anywhere).

    torch's product on a CPU is vectorised for bfloat16 alone: 300 rows take forty times as long as
    dequantizing in float32.
    """
    rows, columns = weight.q.shape
    group = weight.group_size
    fits = rows % 16 == 0 and columns % 32 == 0 and group % min(int4_cpu.GROUPS) == 0
    if device.type == "cpu" and dtype is torch.bfloat16 and fits:
        return "cpu"
    kernels = device.type == "cuda" and decode_kernels_enabled() and dtype in (torch.float16, torch.bfloat16)
    if kernels and columns % 128 == 0 and (group in (32, 64) or group % 128 == 0):
        # What zero points are built on holds whole numbers alone.
        whole = bool((weight.zeros == weight.zeros.round()).all() and (weight.zeros <= 16).all())
        return "words" if whole else "bytes"
    return "bytes"
