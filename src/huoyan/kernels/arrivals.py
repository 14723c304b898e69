"""Counters for kernels in which the last program to come finishes what the others began.

All kernels of a stream share them. That is right because of three things that every such kernel does: it touches them
only after `huoyan.kernels.dependent_launch.wait`, when all that the stream had before is done, however early the kernel
itself started; whoever comes last puts its counter back to zero; and nothing else writes there. So each finds zeros,
graphs included, which are replayed in the order of the stream that they were captured for. Kernels of other streams,
as the picture encoder's, may run at the same time and have their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1024
_KEPT: dict[tuple[torch.device, int, int], Tensor] = {}
"""By device, stream and size. None is ever given up for a larger one: graphs know where it lies."""


def arrivals(count: int, device: torch.device) -> Tensor:
    """int32 zeros, at least `count`, of the current stream, which a kernel must leave as zeros.

    Those that are made while a graph is captured belong to the graph, which makes them zeros each time. It need not
    where the same was run on that stream before.
    """
    size = max(_LEAST, 1 << (count - 1).bit_length())
    cuda = device.type == "cuda"
    key = device, torch.cuda.current_stream(device).cuda_stream if cuda else 0, size
    found = _KEPT.get(key)
    if found is None:
        found = torch.zeros(size, dtype=torch.int32, device=device)
        if not (cuda and torch.cuda.is_current_stream_capturing()):
            _KEPT[key] = found
    return found
