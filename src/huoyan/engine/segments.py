"""Torch's CUDA allocator in segments that grow, where nobody has configured it otherwise, and weights without gaps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from huoyan.planning.allocator import GROWING, grows
from huoyan.planning.sizes import MIB

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)
_GAPS = 24 * MIB
"""Fewer are left where they are."""
_AT_ONCE = 512 * MIB


def let_segments_grow(device: torch.device) -> None:
    """Call it before weights are loaded: what was allocated before stays in segments of fixed sizes.

    Weights of odd sizes leave gaps in those, and so do the changing sizes of a step's tensors.
    """
    import torch

    if device.type == "cuda" and grows():
        torch._C._accelerator_setAllocatorSettings(GROWING)


def close_gaps(model: nn.Module, device: torch.device) -> None:
    """Lay the tensors of a model that nothing has used yet side by side, where what came and went while they were
    loaded has left much between them.

    Packing int4 leaves 184 MiB so, which torch cannot give back: a segment's pages go where nothing is on them.
    """
    import torch

    if device.type != "cuda" or not grows():
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    gaps = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if gaps < _GAPS:
        return
    # What torch keeps of another stream is apart: only these are there.
    stream = torch.cuda.Stream(device)
    lay_side_by_side(model, lambda: torch.cuda.stream(stream), torch.cuda.empty_cache)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    left = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    log.debug("gaps between weights: %d MiB before, %d MiB now", gaps // MIB, left // MIB)


def lay_side_by_side(model: nn.Module, elsewhere: Callable[[], Any], give_back: Callable[[], None]) -> None:
    """Give each storage of a model other memory, `elsewhere`; all tensors that share it go along.

    `give_back` is called now and then for what they were in. Nothing may be at work on them. Where memory is too short
    for a copy of the largest ones, those stay.
    """
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
    moved = 0
    for storage in sorted(storages.values(), key=lambda storage: storage.nbytes()):
        if not storage.resizable():
            continue
        size = storage.nbytes()
        try:
            held = storage.clone()
        except torch.OutOfMemoryError:
            break
        if held.device.type == "cuda":
            torch.cuda.synchronize(held.device)
        storage.resize_(0)
        with elsewhere():
            storage.resize_(size)
            storage.copy_(held)
        if held.device.type == "cuda":
            torch.cuda.synchronize(held.device)
        del held
        moved += size
        if moved >= _AT_ONCE:
            give_back()
            moved = 0
