"""What a decode step's graph reads, brought to the device by one small kernel that reads the host's memory itself:
only what the step has, and between this kernel and those beside it the device does not change over to copying."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from huoyan.kernels.dependent_launch import begin, launch_options, overlaps, wait
from huoyan.kernels.launching import launch

TOKEN, POSITION, SLOT, LENGTH, SOURCE = range(5)
"""Rows of the host's numbers; the device has the first four. SOURCE: where the token stands among those that only the
device knows; -1 where the host knows it."""
TILE = 256
"""Numbers a program takes: one a thread, so that a warp asks the host for a line of memory at once."""


def fill_inputs_reference(
    host_numbers: Tensor,
    host_tables: Tensor,
    ids: Tensor,
    numbers: Tensor,
    tables: Tensor,
    size: int,
    count: int,
    blocks: int,
) -> None:
    """The same in plain PyTorch; see `fill_inputs`."""
    known, sources = host_numbers[:SOURCE, :count], host_numbers[SOURCE, :count].long()
    numbers[SLOT, count:size], numbers[LENGTH, count:size] = -1, 1
    numbers[:, :count] = known
    numbers[TOKEN, :count] = torch.where(sources >= 0, ids[sources.clamp(min=0)].int(), known[TOKEN])
    tables[:count, :blocks] = host_tables[:count, :blocks]


# These differ from step to step: a form for each alignment would be compiled while others wait.
@triton.jit(do_not_specialize=["ids_ptr", "size", "count", "blocks"])
def _kernel(
    host_numbers_ptr, host_tables_ptr, ids_ptr, numbers_ptr, tables_ptr, size, count, blocks, pitch, stride,
    TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    # The first of the second axis have numbers of many rows each, the others some blocks of one.
    numbers = tl.program_id(1) == 0
    lane = tl.arange(0, TILE)
    row = tl.program_id(0) * TILE + lane
    filled = numbers & (row < size)
    there = filled & (row < count)
    column = (tl.program_id(1) - 1) * TILE + lane
    ok = (column >= 0) & (column < blocks) & (tl.program_id(0) < count)
    at = tl.program_id(0) * stride + column
    # The host wrote these before it launched this: they are on their way while the kernel before ends.
    table = tl.load(host_tables_ptr + at, mask=ok, other=0)
    first = host_numbers_ptr + row
    token = tl.load(first, mask=there, other=0)
    position = tl.load(first + pitch, mask=there, other=0)
    slot = tl.load(first + 2 * pitch, mask=there, other=-1)
    length = tl.load(first + 3 * pitch, mask=there, other=1)
    source = tl.load(first + 4 * pitch, mask=there, other=-1)
    wait(OVERLAP)
    tl.store(tables_ptr + at, table, mask=ok)
    late = tl.load(ids_ptr + source, mask=source >= 0, other=0).to(tl.int32)
    tl.store(numbers_ptr + row, tl.where(source >= 0, late, token), mask=there)
    tl.store(numbers_ptr + pitch + row, position, mask=there)
    tl.store(numbers_ptr + 2 * pitch + row, slot, mask=filled)
    tl.store(numbers_ptr + 3 * pitch + row, length, mask=filled)


def fill_inputs(
    host_numbers: Tensor,
    host_tables: Tensor,
    ids: Tensor,
    numbers: Tensor,
    tables: Tensor,
    size: int,
    count: int,
    blocks: int,
) -> None:
    """Let the first `size` rows be those of a step that has `count`; the others write nowhere and read one token, at
    the place and of the blocks of a step before.

    Args:
        host_numbers: int32 [5, rows], host_tables: int32 [rows, most blocks], pinned where the device is CUDA; they
            may change when the device has run this. Rows of numbers are named above.
        ids: int64 [N], tokens on the device.
        numbers: int32 [4, rows], tables: int32 [rows, most blocks], on the device; changed.
        blocks: columns of the tables that the step has.
    """
    overlap = numbers.is_cuda and overlaps()
    launch(
        _kernel, (size, 1 + triton.cdiv(blocks, TILE)),
        host_numbers, host_tables, ids, numbers, tables, size, count, blocks, numbers.stride(0), tables.stride(0),
        TILE=TILE, OVERLAP=overlap, num_warps=TILE // 32, **launch_options(overlap),
    )  # fmt: skip
