"""Copy whole blocks of the KV cache, in all layers, from and to where the device says."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.launching import launch

PIECE = 1024


def copy_blocks_reference(stored: Tensor, sources: Tensor, targets: Tensor) -> None:
    """In plain PyTorch."""
    stored.index_copy_(1, targets, stored.index_select(1, sources))


@triton.jit
def _kernel(stored_ptr, sources_ptr, targets_ptr, layer_stride, size, PIECE: tl.constexpr):
    source = tl.load(sources_ptr + tl.program_id(0))
    target = tl.load(targets_ptr + tl.program_id(0))
    if source != target:
        layer = stored_ptr + tl.program_id(1).to(tl.int64) * layer_stride
        at = tl.program_id(2) * PIECE + tl.arange(0, PIECE)
        ok = at < size
        tl.store(layer + target * size + at, tl.load(layer + source * size + at, mask=ok), mask=ok)


def copy_blocks(stored: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Blocks `sources` to `targets`, int64 [N] each; nothing is done where they are the same.

    No target may be another's source. stored: [layers, blocks, ...], contiguous, changed.
    """
    layers, blocks = stored.shape[:2]
    words = stored.view(layers, blocks, -1).view(torch.uint8)
    for dtype in (torch.int64, torch.int32, torch.int16):
        if words.shape[2] % dtype.itemsize == 0:
            words = words.view(dtype)
            break
    size = words.shape[2]
    launch(
        _kernel, (len(sources), layers, triton.cdiv(size, PIECE)),
        words, sources, targets, words.stride(0), size, PIECE=PIECE, num_warps=4,
    )  # fmt: skip
