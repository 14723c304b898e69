"""Prompts as CUDA graphs: the decoder over a whole prompt without a launch from the host for each kernel.

A prompt's kernels take the device less time than the host needs to launch them one by one, up to some thousand tokens;
int4 weights, which are unpacked piece by piece, need twice as many. A graph belongs to a number of tokens; prompts are
filled up to the next one. Only steps that compute whole prompts are captured: later chunks attend to the cache, whose
keys are gathered by lengths that the host knows.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from huoyan.engine.graph_stream import capture_stream
from huoyan.engine.rotated_attention import RotatedAttention
from huoyan.layers.varlen_attention import varlen_attention
from huoyan.planning.graphs import PREFILL_GRAPH_PROMPTS, PREFILL_GRAPH_TOKENS

if TYPE_CHECKING:
    from huoyan.engine.batch import Batch
    from huoyan.engine.graph_memory import GraphMemory
    from huoyan.engine.kv_cache import KVCache
    from huoyan.models.minicpmv import MiniCPMV

log = logging.getLogger(__name__)


class PrefillGraphs:
    """Captures a number of tokens when it is needed for the second time; all graphs share one memory pool."""

    def __init__(self, model: MiniCPMV, cache: KVCache, memory: GraphMemory) -> None:
        self._model = model
        self._cache = cache
        self._pool = memory.pool
        self._graphs: dict[int, _Graph | None] = {}
        """None where a number was needed once."""
        self._gave_up = False
        # One for all sizes: each graph's own would stay with it.
        width = model.config.text.hidden_size
        self._x = memory.exchange[: PREFILL_GRAPH_TOKENS[-1] * width].view(-1, width)

    def run(self, batch: Batch, x: Tensor) -> Tensor | None:
        """The decoder's hidden states [T, hidden] of a step, valid until the next run; None where it is not captured.

        x: [T, hidden], embeddings of the step's tokens.
        """
        if self._gave_up or not self._fits(batch):
            return None
        size = PREFILL_GRAPH_TOKENS[bisect_left(PREFILL_GRAPH_TOKENS, batch.num_tokens)]
        if size not in self._graphs:
            self._graphs[size] = None
            return None
        graph = self._graphs[size] or self._capture(size)
        return None if graph is None else graph.replay(batch, x)

    def capture_all(self) -> None:
        """Every number of tokens, the largest first: the others find room in its memory."""
        if not self._cache.format.group:
            for size in reversed(PREFILL_GRAPH_TOKENS):
                if not self._gave_up:
                    self._capture(size)

    def _capture(self, size: int) -> _Graph | None:
        try:
            graph = _Graph(self._model, self._cache, self._x[:size])
            graph.capture(self._pool)
        except RuntimeError as error:
            # Memory above all. What was captured goes too: the pool may be what is missing.
            log.warning("prompts are not captured as CUDA graphs: %s", str(error).splitlines()[0])
            self._gave_up = True
            self._graphs.clear()
            return None
        self._graphs[size] = graph
        return graph

    @property
    def num_captured(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def _fits(self, batch: Batch) -> bool:
        """Whether the step computes nothing but whole prompts, few enough of them."""
        if batch.num_decodes or batch.num_tokens > PREFILL_GRAPH_TOKENS[-1]:
            return False
        if self._cache.format.group or len(batch.chunks) > PREFILL_GRAPH_PROMPTS:
            return False
        return all(c.start == 0 and c.sequence.group.params.prompt_logprobs is None for c in batch.chunks)


class _Graph:
    """One captured number of tokens, whose inputs and states stay where they are."""

    def __init__(self, model: MiniCPMV, cache: KVCache, x: Tensor) -> None:
        """Replays read `x` [size, hidden] and leave the states in it."""
        self._model = model
        self._x = x
        self._size = size = len(x)
        device = cache.device
        # Positions, slots, and where each prompt begins. One copy fills them all.
        host = torch.zeros(2 * size + PREFILL_GRAPH_PROMPTS + 1, dtype=torch.int32)
        host[size : 2 * size] = -1
        self._host = host.pin_memory()
        self._numbers = self._host.numpy()
        self._inputs = self._host.to(device)
        positions, slots, starts = self._inputs.split([size, size, PREFILL_GRAPH_PROMPTS + 1])
        self._positions = positions
        self._attend = _WholePrompts(model, cache, positions, slots, starts)
        self._graph = torch.cuda.CUDAGraph()
        self._copied = torch.cuda.Event()

    def capture(self, pool: Any) -> None:
        """Run once to compile what is compiled on first use, then capture."""
        stream = capture_stream(self._x.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._model.decoder(self._x, self._positions, self._attend)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool, stream=stream):
            self._x.copy_(self._model.decoder(self._x, self._positions, self._attend))

    def replay(self, batch: Batch, x: Tensor) -> Tensor:
        count, size, numbers = batch.num_tokens, self._size, self._numbers
        # The last copy must have read the host's numbers before they change.
        self._copied.synchronize()
        numbers[:count], numbers[count:size] = batch.positions, 0
        numbers[size : size + count], numbers[size + count : 2 * size] = batch.slot_mapping, -1
        starts = numbers[2 * size :]
        starts[: len(batch.cu_seqlens_q)] = batch.cu_seqlens_q
        # Prompts that are not there are empty; tokens that fill up belong to none.
        starts[len(batch.cu_seqlens_q) :] = np.int32(count)
        self._inputs.copy_(self._host, non_blocking=True)
        self._copied.record()
        self._x[:count].copy_(x)
        self._graph.replay()
        return self._x[:count]


class _WholePrompts(RotatedAttention):
    """See `huoyan.models.qwen2.FusedAttend`: all tokens are of prompts without a past."""

    def __init__(
        self, model: MiniCPMV, cache: KVCache, positions: Tensor, slots: Tensor, starts: Tensor
    ) -> None:
        super().__init__(model, cache)
        self._positions, self._slots, self._starts = positions, slots, starts

    def rotate_and_attend(self, layer: int, qkv: Tensor, bias: Tensor | None) -> Tensor:
        rows = self._rotate(layer, qkv, bias, self._positions, self._slots)
        kv_heads, longest = self._cache.layer(layer)[0].numbers.shape[2], len(rows)
        return varlen_attention(
            rows[:, : self._heads],
            rows[:, self._heads : self._heads + kv_heads],
            rows[:, self._heads + kv_heads :],
            self._starts,
            self._starts,
            longest,
            longest,
            causal=True,
        ).flatten(1)
