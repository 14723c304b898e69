"""From a schedule to logits: the only place where the engine touches the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from huoyan.engine.attention import PagedAttention, Workspace
from huoyan.engine.batch import Batch, build_batch
from huoyan.engine.beam_moves import BeamMoves
from huoyan.engine.decode_rows import DecodeRows
from huoyan.engine.picture_encoder import PictureEncoder
from huoyan.engine.rehearsal import compile_ahead
from huoyan.kernels import decode_kernels_enabled
from huoyan.layers.int4 import reserve_scratch
from huoyan.layers.packed_attention import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from huoyan.engine.decode_graph import DecodeGraphs
    from huoyan.engine.device_beams import DeviceBeams
    from huoyan.engine.graph_memory import GraphMemory
    from huoyan.engine.in_flight import InFlight, Late
    from huoyan.engine.kv_cache import KVCache
    from huoyan.engine.picture_cache import PictureCache
    from huoyan.engine.schedule import Chunk, Schedule
    from huoyan.engine.step_graph import StepGraphs
    from huoyan.kernels.compile_helper import CompileHelper
    from huoyan.media.types import PreparedPicture
    from huoyan.models.minicpmv import MiniCPMV
    from huoyan.models.qwen2 import Attend


@dataclass
class ForwardOutput:
    """What one forward gave."""

    chunks: list[Chunk]
    """Those that sample, the sequences of a group together and in their order."""
    logits: Tensor
    """[rows, vocab] in the model's dtype: of each chunk after its last token, of one with drafts also before each of
    them."""
    prompt_hidden: list[tuple[Chunk, Tensor]] = field(default_factory=list)
    """Hidden states [chunk's tokens, hidden] of requests that want the prompt's log-probabilities."""


def has_fused_attention(model: MiniCPMV, kv_name: str = "auto") -> bool:
    """Whether our kernels serve this model and cache where they lie.

    `kv_name`: of the cache's `KVFormat`.
    """
    return fuses_attention(model.device, model.dtype, model.config.text.head_dim, kv_name)


def fuses_attention(device: torch.device, dtype: torch.dtype, head_dim: int, kv_name: str = "auto") -> bool:
    """The same of a model that is not there yet."""
    sixteen_bits = dtype in (torch.float16, torch.bfloat16)
    if not (device.type == "cuda" and sixteen_bits and head_dim % 8 == 0 and decode_kernels_enabled()):
        return False
    # Triton converts this type from Ada and Hopper on.
    return kv_name != "fp8_e4m3" or torch.cuda.get_device_capability(device) >= (8, 9)


class Runner:
    """Runs steps one after the other on the model's device."""

    def __init__(
        self,
        model: MiniCPMV,
        cache: KVCache,
        pictures: PictureCache,
        max_encoder_slices: int,
        max_encoder_patches: int,
        *,
        graphs: DecodeGraphs | None = None,
        step_graphs: StepGraphs | None = None,
        device_beams: DeviceBeams | None = None,
        shared: GraphMemory | None = None,
    ) -> None:
        """`graphs`: steps of decodes captured as CUDA graphs, `step_graphs`: others; without them every step is
        launched kernel by kernel. `device_beams`: where searches advance on the device. `shared`: memory of the graphs,
        for the encoder's."""
        self.model = model
        self.cache = cache
        self.pictures = pictures
        self.max_encoder_slices = max_encoder_slices
        self.encoder = PictureEncoder(
            model, max_encoder_slices, max_encoder_patches, graphs=graphs is not None, shared=shared
        )
        self.device = cache.device
        self._fused = has_fused_attention(model, cache.format.name)
        self._graphs = graphs
        self._step_graphs = step_graphs
        self._device_beams = device_beams
        self._workspace = Workspace()
        self._decode_rows = DecodeRows(cache.block_size)
        self.copied_blocks = 0
        """Copies on write so far."""

    @torch.inference_mode()
    def capture_all(self, helper: CompileHelper | None = None) -> None:
        """Capture the graphs of all sizes, where there are graphs, and compile what they and pictures take; `helper`
        has processes for it."""
        self._take_what_stays()
        if self._graphs is not None and self._step_graphs is not None:
            compile_ahead(
                self.device, self._graphs, self._step_graphs, self.encoder, self._device_beams, helper
            )
        self.encoder.warm_up()
        self.encoder.capture_all()
        if self._graphs is not None:
            self._graphs.capture_all()
        if self._step_graphs is not None:
            self._step_graphs.capture_all()

    def _take_what_stays(self) -> None:
        """Take memory that steps keep before any that comes and goes, which then has one piece behind it."""
        small = self.model.resampler.query.new_zeros(16, 16)
        # cuBLAS takes its workspace of a stream with the first product there.
        torch.mm(small, small)
        reserve_scratch(self.model, small)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[PreparedPicture], beside: bool = True) -> dict[bytes, Exception]:
        """Encode pictures into the cache, several at once; `beside` decodes, where there are any. Returns those that
        failed, by key."""
        failed: dict[bytes, Exception] = {}
        for together in self.encoder.together(pictures):
            try:
                self._encode(together, beside)
            except Exception as error:  # noqa: PERF203
                if len(together) == 1:
                    failed[together[0].key] = error
                    continue
                # One bad picture must not take the others with it.
                for picture in together:
                    try:
                        self._encode([picture], beside)
                    except Exception as own_error:  # noqa: PERF203
                        failed[picture.key] = own_error
        for key in failed:
            self.pictures.drop(key)
        return failed

    @torch.inference_mode()
    def forward(self, schedule: Schedule, before: InFlight | None = None) -> ForwardOutput:
        """Compute a schedule whose pictures are encoded: copies, keys and values, logits.

        `before`: the step whose tokens are not known yet, where there is one.
        """
        self.cache.copy_blocks(schedule.copies)
        self.copied_blocks += len(schedule.copies)
        batch = self._decode_rows.batch(schedule)
        if batch is None:
            batch = build_batch(schedule, self.cache.block_size, draft_rows=self._fused)
        wanted = batch.sampled_rows
        late = self._late(batch, before)
        moves = BeamMoves.of(batch, before.choice.beams if before else None, self._device_beams, self.cache)
        if self._graphs is not None and self._graphs.fits(batch):
            logits = self._graphs.run(batch, late, moves)
            in_order = batch.sampling is batch.chunks or np.array_equal(wanted, np.arange(len(logits)))
            return ForwardOutput(batch.sampling, logits if in_order else logits[self._to_device(wanted)])
        token_ids = self._to_device(batch.token_ids)
        if late is not None:
            token_ids = self._with_late(token_ids, late)
        # Beams' tokens are to be right before they are embedded.
        prepared = self._step_graphs.prepare(batch) if self._step_graphs is not None else None
        attention = None if prepared is not None else self._attention(batch, token_ids, moves)
        if prepared is not None and moves is not None:
            moves.apply_to(prepared.tensors, token_ids)
        x = self.model.embed(token_ids)
        if schedule.prefills:
            self._place_pictures(batch, x)
        if prepared is not None:
            hidden = prepared.run(x)
        else:
            assert attention is not None
            hidden = self.model.decoder(x, self._to_device(batch.positions), attention)
        rows = self._to_device(wanted)
        out = ForwardOutput(batch.sampling, self.model.head(hidden.index_select(0, rows)))
        for i in range(batch.num_decodes, len(batch.chunks)):
            group = batch.chunks[i].sequence.group
            if group.params.prompt_logprobs is not None and batch.chunks[i].start < group.prompt_len:
                first, last = batch.cu_seqlens_q[i : i + 2].tolist()
                out.prompt_hidden.append((batch.chunks[i], hidden[first:last]))
        return out

    def _late(self, batch: Batch, before: InFlight | None) -> Late | None:
        """The batch's sampled tokens that only the device knows."""
        sequences = [s for s in batch.in_flight if s is not None and not s.group.advances_on_device]
        if not sequences:
            return None
        assert before is not None
        if sequences == batch.in_flight:
            return before.late(sequences, None)
        late = set(sequences)
        rows = [row for row, seq in enumerate(batch.in_flight) if seq in late]
        return before.late(sequences, np.array(rows, np.int64))

    def _with_late(self, token_ids: Tensor, late: Late) -> Tensor:
        """`token_ids` [T] with those of some rows put in."""
        ids = late.ids if late.places is None else late.ids[self._to_device(late.places)]
        if late.rows is None:
            return torch.cat([ids, token_ids[len(ids) :]])
        return token_ids.index_copy(0, self._to_device(late.rows), ids)

    def _attention(self, batch: Batch, token_ids: Tensor, moves: BeamMoves | None = None) -> Attend:
        """`token_ids`, int64 [T] on the device, are changed where `moves` has to."""
        if not self._fused:
            if moves is not None:
                # Only a CPU comes here: what the host laid out is what the device reads.
                own = (batch.positions, batch.slot_mapping, batch.block_tables)
                moves.apply(token_ids, *(torch.from_numpy(array) for array in own))
            return PagedAttention(self.cache, batch, self.model.dtype, self._workspace)
        from huoyan.engine.attention_cuda import CudaAttention, StepTensors

        tensors = StepTensors.of(batch, self.device)
        if moves is not None:
            moves.apply_to(tensors, token_ids)
        return CudaAttention(self.model, self.cache, tensors)

    def _encode(self, pictures: list[PreparedPicture], beside: bool) -> None:
        encoded, ready = self.encoder.encode(pictures, beside)
        for picture, embeddings in zip(pictures, encoded, strict=True):
            self.pictures.put(picture.key, embeddings, ready)

    def _place_pictures(self, batch: Batch, x: Tensor) -> None:
        """Overwrite the placeholder rows of `x: [T, hidden]` with the rows of the slices they stand for."""
        for i in range(batch.num_decodes, len(batch.chunks)):
            chunk = batch.chunks[i]
            shift = int(batch.cu_seqlens_q[i]) - chunk.start
            for use in chunk.sequence.group.pictures:
                targets, sources = [], []
                for run in use.runs:
                    first, last = max(run.start, chunk.start), min(run.end, chunk.end)
                    if first < last:
                        targets.append(np.arange(first + shift, last + shift))
                        offset = run.slice_index * (run.end - run.start) - run.start
                        sources.append(np.arange(first + offset, last + offset))
                if targets:
                    embeddings = self.pictures.get(use.key).flatten(0, 1)
                    rows = embeddings.index_select(0, self._to_device(np.concatenate(sources)))
                    x.index_copy_(0, self._to_device(np.concatenate(targets)), rows.to(x.dtype))

    def _to_device(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        return to_device(torch.from_numpy(array), self.device)
