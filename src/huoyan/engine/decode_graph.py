"""Decode steps as CUDA graphs: from token ids to hidden states without a launch from the host for each kernel.

One graph for each of a few batch sizes, captured when it is needed for the third time: while requests come and go many
sizes pass once, and a capture takes as long as some ten steps. Until then a larger graph that is there serves, its
spare rows writing nowhere, or the step is launched kernel by kernel. Graphs share one memory pool. The head is launched
behind them: its logits are by far the largest tensor of a step, and so take memory that its other moments use too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from huoyan.engine.graph_stream import run_and_capture
from huoyan.engine.rotated_attention import RotatedAttention
from huoyan.kernels.paged_decode import paged_decode
from huoyan.planning.graphs import graph_sizes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from huoyan.engine.batch import Batch
    from huoyan.engine.beam_moves import BeamMoves
    from huoyan.engine.kv_cache import KVCache
    from huoyan.engine.runner import Late
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
        self._max_blocks = -(-max_model_len // cache.block_size)
        self._pool = pool
        # One for all sizes: each graph's own would stay with it.
        self._hidden = torch.empty(
            self._sizes[-1], model.config.text.hidden_size, dtype=model.dtype, device=cache.device
        )
        self._inputs = torch.empty(
            self._sizes[-1], 4 + self._max_blocks, dtype=torch.int32, device=cache.device
        )
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

    def capture_all(self) -> None:
        """Every size, the largest first: the others find room in its memory."""
        for size in reversed(self._sizes):
            self._capture(size)

    def _capture(self, size: int) -> None:
        graph = _Graph(self._model, self._cache, self._hidden[:size], self._inputs[:size])
        graph.capture(self._pool)
        self._pool = graph.pool
        self._graphs[size] = graph


class _Graph:
    """One captured batch size, whose inputs and states stay where they are."""

    def __init__(self, model: MiniCPMV, cache: KVCache, hidden: Tensor, inputs: Tensor) -> None:
        """`hidden`: [size, hidden], where a replay leaves the states. `inputs`: int32 [size, 4 + blocks], one row a
        sequence: token, position, slot, length, then its blocks."""
        self._model = model
        self._cache = cache
        self._hidden = hidden
        self._inputs = inputs
        # One copy fills them all.
        host = torch.zeros(inputs.shape, dtype=torch.int32)
        host[:, 2], host[:, 3] = -1, 1
        self._host = host.pin_memory()
        self._rows: NDArray[np.int32] = self._host.numpy()
        self._inputs.copy_(self._host)
        self._graph = torch.cuda.CUDAGraph()
        self._copied = torch.cuda.Event()

    @property
    def pool(self) -> Any:
        return self._graph.pool()

    def capture(self, pool: Any) -> None:
        run_and_capture(self._graph, self._forward, pool, self._cache.device)

    def replay(self, batch: Batch, late: Late | None, moves: BeamMoves | None = None) -> Tensor:
        count = len(batch.chunks)
        # The last copy must have read the host's rows before they change.
        self._copied.synchronize()
        rows = self._rows
        rows[:count, 0], rows[:count, 1] = batch.token_ids, batch.positions
        rows[:count, 2], rows[:count, 3] = batch.slot_mapping, batch.seq_lens
        blocks = batch.block_tables.shape[1]
        rows[:count, 4 : 4 + blocks] = batch.block_tables
        rows[count:, 2], rows[count:, 3] = -1, 1
        self._inputs.copy_(self._host, non_blocking=True)
        self._copied.record()
        if late is not None:
            which, ids = late
            if which is None:
                self._inputs[: len(ids), 0].copy_(ids)
            else:
                self._inputs[:, 0].index_copy_(0, which, ids.to(torch.int32))
        if moves is not None:
            tokens, positions, slots = self._inputs[:, :3].unbind(1)
            moves.apply(tokens, positions, slots, self._inputs[:, 4:])
        self._graph.replay()
        return self._hidden

    def _forward(self) -> None:
        tokens, positions = self._inputs[:, 0].long(), self._inputs[:, 1].long()
        attend = _GraphAttention(self._model, self._cache, self._inputs)
        x = self._model.embed(tokens)
        self._hidden.copy_(self._model.decoder(x, positions, attend))


class _GraphAttention(RotatedAttention):
    """See `huoyan.models.qwen2.FusedAttend`: every row is a decode."""

    def __init__(self, model: MiniCPMV, cache: KVCache, inputs: Tensor) -> None:
        super().__init__(model, cache)
        self._positions, self._slots, self._lengths = (inputs[:, i].contiguous() for i in (1, 2, 3))
        self._blocks = inputs[:, 4:]

    def rotate_and_attend(self, layer: int, qkv: Tensor, bias: Tensor | None) -> Tensor:
        rows = self._rotate(layer, qkv, bias, self._positions, self._slots)
        keys, values = self._cache.layer(layer)
        return paged_decode(
            rows[:, : self._heads],
            keys.typed,
            values.typed,
            self._blocks,
            self._lengths,
            keys.scales,
            values.scales,
        ).flatten(1)
