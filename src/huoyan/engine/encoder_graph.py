"""The encoder as CUDA graphs, for the slice grids that come again and again.

A graph belongs to one sequence of grids. Small batches gain: launching a slice's kernels one by one takes the host
longer than they take the device. Large ones keep the device busy anyway and would only hold memory. What goes into a
graph and comes out of it lies in the same place for all of them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from huoyan.models.siglip import PackedGrids
from huoyan.planning.pieces import ENCODER_GRAPH_PATCHES, ENCODER_GRAPH_SLICES, ENCODER_GRAPHS

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
        if patches.shape[0] > self._most_patches or len(grids) > ENCODER_GRAPH_SLICES:
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
        config = model.config
        self._patches = model.resampler.query.new_empty(
            ENCODER_GRAPH_PATCHES, 3 * config.vision.patch_size**2
        )
        self._embeddings = model.resampler.query.new_empty(
            ENCODER_GRAPH_SLICES, config.query_num, config.text.hidden_size
        )

    def __call__(self, grids: PackedGrids) -> Captured:
        into, out = self._patches[: sum(grids.lengths)], self._embeddings[: len(grids)]
        graph = _Graph(self._model, grids, into, out, self._pool)
        self._pool = graph.pool
        return graph


class _Graph:
    def __init__(
        self, model: MiniCPMV, grids: PackedGrids, patches: Tensor, embeddings: Tensor, pool: Any
    ) -> None:
        """Replays read `patches` [P, pixels] and write `embeddings` [slices, query_num, hidden]."""
        # The graph reads what the grids keep on the device, and where they keep it.
        self._grids = grids
        self._patches = patches
        self._embeddings = embeddings
        # Once without, to send and compile what is sent and compiled on first use.
        model.encode_patches(patches, grids)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=torch.cuda.current_stream()):
            embeddings.copy_(model.encode_patches(patches, grids))

    @property
    def pool(self) -> Any:
        return self._graph.pool()

    def replay(self, patches: Tensor) -> Tensor:
        self._patches.copy_(patches)
        self._graph.replay()
        return self._embeddings
