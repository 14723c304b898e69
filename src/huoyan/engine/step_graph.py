"""Steps that compute prompts as CUDA graphs: the decoder over prompts, beside decodes or alone, without a launch from
the host for each kernel.

Their kernels take the device less time than a busy host needs to launch them one by one, up to some thousand tokens;
int4 weights, which are unpacked piece by piece, need twice as many. A graph belongs to a number of tokens; steps are
filled up to the next one. Which of its rows are decodes, where prompts begin and what they attend to is read on the
device.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from huoyan.engine.attention_cuda import CudaAttention, StepTensors
from huoyan.engine.graph_stream import run_and_capture
from huoyan.engine.pinned import PinnedIntegers
from huoyan.kernels.paged_prefill import prefill_tiles
from huoyan.models.qwen2 import DIFFERENT_LAYERS
from huoyan.planning.graphs import STEP_GRAPH_PARTS, StepGraphSize, step_graph_inputs, step_graph_sizes

if TYPE_CHECKING:
    from huoyan.engine.batch import Batch
    from huoyan.engine.graph_memory import GraphMemory
    from huoyan.engine.kv_cache import KVCache
    from huoyan.models.minicpmv import MiniCPMV

log = logging.getLogger(__name__)


class StepGraphs:
    """Captures a size when it is needed for the second time; all graphs share one memory pool."""

    def __init__(
        self,
        model: MiniCPMV,
        cache: KVCache,
        memory: GraphMemory,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        decodes_alone: int,
        whole_tiles: bool = False,
    ) -> None:
        """`decodes_alone`: rows up to which `DecodeGraphs` has steps of decodes only; `whole_tiles`: see
        `huoyan.planning.graphs.step_graph_sizes`."""
        self._model = model
        self._pool = memory.pool
        self._decodes_alone = decodes_alone
        self._prompts, self._mixed = step_graph_sizes(max_num_batched_tokens, max_num_seqs, whole_tiles)
        self._graphs: dict[StepGraphSize, _Graph | None] = {}
        """None where a size was needed once."""
        self._gave_up = False
        # One of each for all sizes: each graph's own would stay with it.
        sizes = [*self._prompts, *self._mixed]
        width = model.config.text.hidden_size
        self._x = memory.exchange[: max(size.tokens for size in sizes) * width].view(-1, width)
        self._inputs = _Inputs(cache, sizes, max_model_len)

    def prepare(self, batch: Batch) -> Prepared | None:
        """A step's graph, with what it needs to know on its way to the device; None where it is not captured."""
        size = None if self._gave_up else self._size_for(batch)
        if size is None:
            return None
        if size not in self._graphs:
            self._graphs[size] = None
            return None
        graph = self._graphs[size] or self._capture(size)
        if graph is None:
            return None
        self._inputs.fill(size, batch)
        return Prepared(graph, batch.num_tokens)

    def rehearse(self) -> None:
        """Go through what every size launches (see `huoyan.kernels.launching`)."""
        for size in self._largest_first():
            self._new(size).rehearse()

    def capture_all(self) -> None:
        """Every size, the largest first: the others find room in its memory."""
        for size in self._largest_first():
            if not self._gave_up:
                self._capture(size)

    @property
    def num_captured(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def _size_for(self, batch: Batch) -> StepGraphSize | None:
        """The smallest size with room for a step; None where there is none, or where another kind of graph serves."""
        chunks = batch.chunks[batch.num_decodes :]
        if not chunks and batch.num_decodes <= self._decodes_alone:
            return None
        # States of such prompts are read when the next step may be there already.
        if any(chunk.sequence.group.params.prompt_logprobs is not None for chunk in chunks):
            return None
        for sizes in (self._prompts, self._mixed):
            at = bisect_left(sizes, batch.num_tokens, key=lambda size: size.tokens)
            if at < len(sizes) and len(chunks) <= sizes[at].chunks and batch.num_decodes <= sizes[at].decodes:
                return sizes[at]
        return None

    def _largest_first(self) -> tuple[StepGraphSize, ...]:
        return (*reversed(self._mixed), *reversed(self._prompts))

    def _new(self, size: StepGraphSize) -> _Graph:
        return _Graph(self._model, self._x[: size.tokens], self._inputs, size)

    def _capture(self, size: StepGraphSize) -> _Graph | None:
        try:
            graph = self._new(size)
            graph.capture(self._pool)
        except RuntimeError as error:
            # Memory above all. What was captured goes too: the pool may be what is missing.
            log.warning("steps with prompts are not captured as CUDA graphs: %s", str(error).splitlines()[0])
            self._gave_up = True
            self._graphs.clear()
            return None
        self._graphs[size] = graph
        return graph


class Prepared:
    """A graph that knows its step, all but the embeddings."""

    def __init__(self, graph: _Graph, count: int) -> None:
        self._graph = graph
        self._count = count
        self.tensors = graph.tensors
        """Read when it runs; rows beyond the step's tokens are of nothing."""

    def run(self, x: Tensor) -> Tensor:
        """The decoder's hidden states [T, hidden], valid until the next graph of the stream runs; x [T, hidden] are
        embeddings."""
        return self._graph.replay(x, self._count)


class _Inputs:
    """Integers that graphs read, here and on the device: two copies a step fill them."""

    def __init__(self, cache: KVCache, sizes: list[StepGraphSize], max_model_len: int) -> None:
        self.cache = cache
        numbers, tables = step_graph_inputs(sizes, -(-max_model_len // cache.block_size))
        shapes = ((numbers,), tables)
        self.numbers, self.tables = (
            torch.zeros(shape, dtype=torch.int32, device=cache.device) for shape in shapes
        )
        self._written = PinnedIntegers(shapes, cache.device)

    def tensors(self, size: StepGraphSize) -> StepTensors:
        """Where a graph of this size reads them."""
        counts = [size.tokens, size.tokens, size.decodes, 4 * size.tiles]
        positions, slots, lens, tiles = self.numbers[: size.numbers].split(counts)
        return StepTensors(positions, slots, lens, tiles.view(-1, 4), size.queries, self.tables)

    def clear(self, size: StepGraphSize) -> None:
        """On the device: a step of nothing, which leaves the cache alone."""
        self.numbers.zero_()
        self.tensors(size).slot_mapping.fill_(-1)

    def fill(self, size: StepGraphSize, batch: Batch) -> None:
        """Send what a step's tokens, decodes and tiles are."""
        # The last copy must have read the host's numbers before they change.
        self._written.wait()
        written, tables = self._written.arrays
        count, tokens, decodes = batch.num_tokens, size.tokens, batch.num_decodes
        numbers = written[: size.numbers]
        numbers[:] = 0
        numbers[:count] = batch.positions
        numbers[tokens : tokens + count] = batch.slot_mapping
        numbers[tokens + count : 2 * tokens] = -1
        numbers[2 * tokens : 2 * tokens + decodes] = batch.seq_lens[:decodes]
        tiles = prefill_tiles(batch.cu_seqlens_q, batch.seq_lens, decodes, size.queries).reshape(-1)
        first = 2 * tokens + size.decodes
        numbers[first : first + len(tiles)] = tiles
        rows, blocks = batch.block_tables.shape
        tables[:rows, :blocks] = batch.block_tables
        for to, of, some in zip(
            (self.numbers, self.tables), self._written.tensors, (size.numbers, rows), strict=True
        ):
            to[:some].copy_(of[:some], non_blocking=True)
        self._written.mark()


class _Graph:
    """One captured size, whose inputs and states stay where they are."""

    def __init__(self, model: MiniCPMV, x: Tensor, inputs: _Inputs, size: StepGraphSize) -> None:
        """Replays read `x` [tokens, hidden] and leave the states in it."""
        self._model = model
        self._x = x
        self._inputs = inputs
        self._size = size
        self.tensors = inputs.tensors(size)
        self._attend = CudaAttention(model, inputs.cache, self.tensors, STEP_GRAPH_PARTS)
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, pool: Any) -> None:
        self._inputs.clear(self._size)
        run_and_capture(self._graph, self.rehearse, self.forward, pool, self._x.device)

    def replay(self, x: Tensor, count: int) -> Tensor:
        self._x[:count].copy_(x)
        self._graph.replay()
        return self._x[:count]

    def rehearse(self) -> None:
        """Launch all that there is to launch, for few layers."""
        self.forward(DIFFERENT_LAYERS)

    def forward(self, layers: int | None = None) -> None:
        """What is captured, launched."""
        self._model.decoder(self._x, self.tensors.positions, self._attend, self._x, layers)
