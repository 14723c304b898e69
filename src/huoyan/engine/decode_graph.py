"""Decode steps as CUDA graphs: from token ids to hidden states without a launch from the host for each kernel.

One graph for each of a few batch sizes, captured when it is needed for the third time: while requests come and go many
sizes pass once, and a capture takes as long as some ten steps. Until then a larger graph that is there serves, its
spare rows writing nowhere, or the step is launched kernel by kernel. Graphs share one memory pool. The head is launched
behind them: its logits are by far the largest tensor of a step, and so take memory that its other moments use too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from huoyan.engine.attention_cuda import CudaAttention
from huoyan.engine.decode_inputs import DecodeInputs
from huoyan.engine.graph_stream import run_and_capture
from huoyan.models.qwen2 import DIFFERENT_LAYERS
from huoyan.planning.graphs import graph_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huoyan.engine.batch import Batch
    from huoyan.engine.beam_moves import BeamMoves
    from huoyan.engine.in_flight import Late
    from huoyan.engine.kv_cache import KVCache
    from huoyan.models.minicpmv import MiniCPMV


_USES_BEFORE_CAPTURE = 3


class DecodeGraphs:
    """`run(batch)` gives the logits of a step that is decodes only."""

    def __init__(
        self, model: MiniCPMV, cache: KVCache, max_num_seqs: int, max_model_len: int, pool: Any = None
    ) -> None:
        """`pool`: of `torch.cuda.graph_pool_handle`, where other graphs share it."""
        self._model = model
        self._cache = cache
        self._sizes = graph_sizes(max_num_seqs)
        self._pool = pool
        # One for all sizes: each graph's own would stay with it.
        self._hidden = torch.empty(
            self._sizes[-1], model.config.text.hidden_size, dtype=model.dtype, device=cache.device
        )
        self._inputs = DecodeInputs(self._sizes[-1], -(-max_model_len // cache.block_size), cache.device)
        self._graphs: dict[int, _Graph] = {}
        self._wanted: dict[int, int] = {}
        """How often a size without a graph was needed."""

    def fits(self, batch: Batch) -> bool:
        """Whether the step is decodes only, few enough, and there is a graph for it, or is to be one."""
        count = len(batch.chunks)
        if not batch.num_decodes == count <= self._sizes[-1]:
            return False
        size = self._size_for(count)
        if size not in self._graphs:
            self._wanted[size] = self._wanted.get(size, 0) + 1
        return self._chosen_size(count) is not None

    def _size_for(self, count: int) -> int:
        return next(s for s in self._sizes if s >= count)

    def _chosen_size(self, count: int) -> int | None:
        """The graph's size that a step of `count` rows takes now; None for none."""
        size = self._size_for(count)
        if size in self._graphs or self._wanted.get(size, 0) >= _USES_BEFORE_CAPTURE:
            return size
        return next((s for s in self._sizes if 2 * count >= s > size and s in self._graphs), None)

    def run(self, batch: Batch, late: Late | None = None, moves: BeamMoves | None = None) -> Tensor:
        """[decodes, vocab] in the model's dtype (float32 for a few rows), a row for each of the batch's tokens.

        `late`: tokens that only the device knows; `moves`: beams that only it knows.
        """
        count = len(batch.chunks)
        size = self._chosen_size(count)
        assert size is not None, "asked without `fits`"
        if size not in self._graphs:
            self._capture(size)
        return self._model.head(self._graphs[size].replay(batch, late, moves)[:count])

    def rehearse(self) -> Iterator[Tensor]:
        """Go through what every size launches (see `huoyan.kernels.launching`); gives logits as its steps do."""
        for size in reversed(self._sizes):
            self._inputs.clear(size)
            self._new(size).rehearse()
            yield self._model.head(self._hidden[:size])

    def capture_all(self) -> None:
        """Every size, the largest first: the others find room in its memory."""
        for size in reversed(self._sizes):
            self._capture(size)

    def _capture(self, size: int) -> None:
        graph = self._new(size)
        graph.capture(self._pool)
        self._pool = graph.pool
        self._graphs[size] = graph

    def _new(self, size: int) -> _Graph:
        return _Graph(self._model, self._cache, self._hidden[:size], self._inputs, size)


class _Graph:
    """One captured batch size, whose inputs and states stay where they are."""

    def __init__(
        self, model: MiniCPMV, cache: KVCache, hidden: Tensor, inputs: DecodeInputs, size: int
    ) -> None:
        """`hidden`: [size, hidden], where a replay leaves the states."""
        self._model = model
        self._hidden = hidden
        self._inputs = inputs
        self._size = size
        self._tensors = inputs.tensors(size)
        self._attend = CudaAttention(model, cache, self._tensors.step)
        self._graph = torch.cuda.CUDAGraph()

    @property
    def pool(self) -> Any:
        return self._graph.pool()

    def capture(self, pool: Any) -> None:
        self._inputs.clear(self._size)
        run_and_capture(self._graph, self.rehearse, self.forward, pool, self._hidden.device)

    def replay(self, batch: Batch, late: Late | None, moves: BeamMoves | None = None) -> Tensor:
        self._inputs.fill(self._size, batch, late, moves)
        self._graph.replay()
        self._inputs.launched()
        return self._hidden

    def rehearse(self) -> None:
        """Launch all that there is to launch, for few layers."""
        self.forward(DIFFERENT_LAYERS)

    def forward(self, layers: int | None = None) -> None:
        """What is captured, launched."""
        x = self._model.embed(self._tensors.tokens)
        self._model.decoder(x, self._tensors.step.positions, self._attend, self._hidden, layers)
