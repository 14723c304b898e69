"""The encoder's layers as CUDA graphs of a few sizes, for slices of any grids.

Launching a pass kernel by kernel takes the host longer than the device computes it: 27 layers of ten kernels, and
torch asks cuBLAS for the best way of each product. A graph has room for so many patches of so many slices; where each
slice begins is read on the device, and rows that nobody needs belong to no slice. What goes in and what comes out are
one tensor, the same for all sizes, and so is the memory that a pass takes. The patches' embeddings before and the
resampler behind, which has a tensor of each slice's shape, are launched as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from huoyan.layers.packed_attention import Lengths
from huoyan.planning.pieces import ENCODER_GRAPH_LONGEST, ENCODER_GRAPH_SLICES

if TYPE_CHECKING:
    from huoyan.engine.graph_memory import GraphMemory
    from huoyan.models.minicpmv import MiniCPMV
    from huoyan.models.siglip import PackedGrids

log = logging.getLogger(__name__)


class Captured(Protocol):
    def replay(self, x: Tensor, lengths: Lengths) -> Tensor:
        """What the layers give for embeddings [P, hidden] of slices of these lengths: [P, hidden], valid until the next
        replay of any graph."""


class EncoderGraphs:
    """Captures a size when it is needed for the second time, or all of them at once."""

    def __init__(self, capture: Callable[[int], Captured], sizes: Sequence[int]) -> None:
        """`sizes`: patches that graphs have room for, ascending."""
        self._capture = capture
        self._sizes = tuple(sizes)
        self._graphs: dict[int, Captured | None] = {}
        """None where a size was needed once."""
        self._gave_up = False

    def run(self, x: Tensor, grids: PackedGrids) -> Tensor | None:
        """What the encoder gives for the embeddings x [P, hidden] of slices, valid until the next call; None where
        there is no graph for them."""
        lengths = grids.lengths
        size = next((size for size in self._sizes if size >= len(x)), None)
        if size is None or len(lengths) > ENCODER_GRAPH_SLICES or max(lengths) > ENCODER_GRAPH_LONGEST:
            return None
        if size not in self._graphs and not self._gave_up:
            self._graphs[size] = None
            return None
        graph = self._graphs.get(size) or self._captured(size)
        return None if graph is None else graph.replay(x, lengths)

    def capture_all(self) -> None:
        """Every size, the largest first: the others find room in its memory."""
        for size in reversed(self._sizes):
            self._captured(size)

    def _captured(self, size: int) -> Captured | None:
        if self._gave_up:
            return None
        try:
            graph = self._graphs[size] = self._capture(size)
        except RuntimeError as error:
            # Memory above all. What was captured goes on; nothing more is tried.
            log.warning("the encoder is not captured as CUDA graphs: %s", str(error).splitlines()[0])
            self._gave_up = True
            return None
        return graph

    @property
    def num_captured(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())


class CudaCapture:
    """Captures the encoder's layers on the current stream."""

    def __init__(self, model: MiniCPMV, most_patches: int, memory: GraphMemory) -> None:
        self._model = model
        self._pool = memory.pool
        width = model.config.vision.hidden_size
        # One for all sizes: each graph's own would stay with it.
        self._x = memory.exchange[: most_patches * width].view(-1, width)
        self._starts = torch.zeros(ENCODER_GRAPH_SLICES + 1, dtype=torch.int32, device=model.device)
        self._compiled = False

    def __call__(self, size: int) -> Captured:
        lengths = Lengths.of_device(self._starts, ENCODER_GRAPH_LONGEST)
        x = self._x[:size]
        if not self._compiled:
            # To compile what is compiled on first use.
            self._model.vpm.layers(x, lengths)
            self._compiled = True
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
            x.copy_(self._model.vpm.layers(x, lengths))
        return _Graph(graph, x, self._starts)


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, x: Tensor, starts: Tensor) -> None:
        """Replays read `x` [size, hidden] and `starts` int32 [slices + 1], and write over `x`."""
        self._graph, self._x, self._starts = graph, x, starts

    def replay(self, x: Tensor, lengths: Lengths) -> Tensor:
        own = self._x[: len(x)]
        own.copy_(x)
        # Slices that are not there are empty.
        self._starts.fill_(len(x))
        self._starts[: len(lengths) + 1].copy_(lengths.cumulative(x.device))
        self._graph.replay()
        return own
