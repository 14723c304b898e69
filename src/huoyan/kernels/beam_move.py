"""The rows of beams that only the device knows, from those of a step ago, in one kernel. The plain reference is
`huoyan.layers.beam_step.move_rows`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.launching import launch

TILE = 256
_OF = ("tokens", "positions", "slots", "tables", "old")
_POINTERS = ["orders_ptr", "found_ptr", *(f"{name}_ptr" for name in _OF)]
_STRIDES = ["found_search", "found_beam", *(f"{name}_stride" for name in _OF)]


# Where these lie differs from step to step: a form for each alignment would be compiled while others wait.
@triton.jit(do_not_specialize=[*_POINTERS, *_STRIDES])
def _kernel(
    orders_ptr, found_ptr, tokens_ptr, positions_ptr, slots_ptr, tables_ptr, old_ptr, sources_ptr, targets_ptr,
    found_search, found_beam, tokens_stride, positions_stride, slots_stride, tables_stride, old_stride,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    row = tl.load(orders_ptr + 4 * i)
    search = tl.load(orders_ptr + 4 * i + 1)
    beam = tl.load(orders_ptr + 4 * i + 2)
    first = tl.load(orders_ptr + 4 * i + 3)
    facts = found_ptr + search * found_search + beam * found_beam
    parent = tl.maximum(tl.load(facts), 0)
    token = tl.maximum(tl.load(facts + 1), 0)
    block = tl.maximum(tl.load(facts + 2), 0)
    position = tl.load(positions_ptr + row * positions_stride).to(tl.int64)
    current = position // BLOCK_SIZE
    offset = position % BLOCK_SIZE
    source = tl.load(old_ptr + (first + parent) * old_stride + current).to(tl.int64)
    target = tl.load(old_ptr + (first + block) * old_stride + current).to(tl.int64)
    for start in range(0, current + 1, TILE):
        column = start + tl.arange(0, TILE)
        ok = column <= current
        value = tl.load(old_ptr + (first + parent) * old_stride + column, mask=ok, other=0)
        value = tl.where(column == current, target.to(value.dtype), value)
        tl.store(tables_ptr + row * tables_stride + column, value, mask=ok)
    tl.store(tokens_ptr + row * tokens_stride, token.to(tokens_ptr.dtype.element_ty))
    tl.store(slots_ptr + row * slots_stride, (target * BLOCK_SIZE + offset).to(slots_ptr.dtype.element_ty))
    # At a block's beginning there is nothing to copy.
    tl.store(sources_ptr + i, tl.where(offset > 0, source, target))
    tl.store(targets_ptr + i, target)


def beam_move(
    orders: Tensor,
    found: Tensor,
    block_size: int,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    tables: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `huoyan.layers.beam_step.move_rows`. `tokens`, `positions` and `slots` may be columns of a larger tensor."""
    old = tables.clone(memory_format=torch.contiguous_format)
    sources, targets = torch.empty((2, len(orders)), dtype=torch.int64, device=tables.device).unbind(0)
    launch(
        _kernel, (len(orders),),
        orders, found, tokens, positions, slots, tables, old, sources, targets,
        found.stride(0), found.stride(1), tokens.stride(0), positions.stride(0), slots.stride(0),
        tables.stride(0), old.stride(0), BLOCK_SIZE=block_size, TILE=TILE, num_warps=4,
    )  # fmt: skip
    return sources, targets
