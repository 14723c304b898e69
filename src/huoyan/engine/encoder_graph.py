"""The encoder as CUDA graphs, for the slice grids that come again and again.

A graph belongs to one sequence of grids. Small batches gain: launching a slice's kernels one by one takes the host
longer than they take the device. Large ones keep the device busy anyway and would only hold memory.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from huoyan.models.siglip import PackedGrids
from huoyan.planning.pieces import ENCODER_GRAPH_PATCHES, ENCODER_GRAPHS

if TYPE_CHECKING:
    from huoyan.models.minicpmv import MiniCPMV

log = logging.getLogger(__name__)


class Captured(Protocol):
    def replay(self, patches: Tensor) -> Tensor:
        """[slices, query_num, hidden], valid until the next replay of any graph."""


class EncoderGraphs:
    """Captures what it sees for the second time, and forgets what was not used for longest."""

    def __init__(
        self,
        capture: Callable[[PackedGrids], Captured],
        most_patches: int = ENCODER_GRAPH_PATCHES,
        most_graphs: int = ENCODER_GRAPHS,
    ) -> None:
        self._capture: Callable[[PackedGrids], Captured | None] = capture
        self._most_patches = most_patches
        self._most_graphs = most_graphs
        self._graphs: OrderedDict[PackedGrids, Captured | None] = OrderedDict()
        """None where grids were seen once."""

    def run(self, patches: Tensor, grids: PackedGrids) -> Tensor | None:
        """The embeddings of normalised patches, valid until the next call; None where there is no graph for them."""
        if patches.shape[0] > self._most_patches:
            return None
        if grids not in self._graphs:
            self._graphs[grids] = None
            while len(self._graphs) > self._most_graphs:
                self._graphs.popitem(last=False)
            return None
        self._graphs.move_to_end(grids)
        graph = self._graphs[grids]
        if graph is None:
            try:
                graph = self._graphs[grids] = self._capture(grids)
            except RuntimeError as error:
                # Memory above all. What was captured goes on; nothing more is tried.
                log.warning("the encoder is not captured as CUDA graphs: %s", str(error).splitlines()[0])
                self._capture = _give_up
        return None if graph is None else graph.replay(patches)

    @property
    def num_captured(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())


def _give_up(grids: PackedGrids) -> None:
    return None


class CudaCapture:
    """Captures the model's encoder on the current stream; all graphs share one memory pool."""

    def __init__(self, model: MiniCPMV) -> None:
        self._model = model
        self._pool: Any = None

    def __call__(self, grids: PackedGrids) -> Captured:
        graph = _Graph(self._model, grids, self._pool)
        self._pool = graph.pool
        return graph


class _Graph:
    def __init__(self, model: MiniCPMV, grids: PackedGrids, pool: Any) -> None:
        # The graph reads what the grids keep on the device, and where they keep it.
        self._grids = grids
        pixels = 3 * model.config.vision.patch_size**2
        self._patches = torch.zeros(sum(grids.lengths), pixels, dtype=model.dtype, device=model.device)
        # Once without, to send and compile what is sent and compiled on first use.
        model.encode_patches(self._patches, grids)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=torch.cuda.current_stream()):
            self._embeddings = model.encode_patches(self._patches, grids)

    @property
    def pool(self) -> Any:
        return self._graph.pool()

    def replay(self, patches: Tensor) -> Tensor:
        self._patches.copy_(patches)
        self._graph.replay()
        return self._embeddings
