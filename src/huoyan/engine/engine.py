"""The native backend: requests in, one step at a time, outputs out."""

from __future__ import annotations

import contextlib
import logging
from time import monotonic
from typing import TYPE_CHECKING, cast

import torch

from huoyan.engine.answer import Answer, AnswerText, ChosenToken, StopRules
from huoyan.engine.beam import BeamSearch
from huoyan.engine.block_pool import BlockPool
from huoyan.engine.chooser import Chooser
from huoyan.engine.config import EngineConfig
from huoyan.engine.device_beams import DecidedBeams, DeviceBeams
from huoyan.engine.in_flight import InFlight
from huoyan.engine.kv_cache import KVCache
from huoyan.engine.output import request_output, shown_answers
from huoyan.engine.picture_cache import PictureCache
from huoyan.engine.prompt_logprobs import prompt_logprobs
from huoyan.engine.prompt_lookup import Speculator
from huoyan.engine.request import check_request
from huoyan.engine.runner import ForwardOutput, Runner, has_fused_attention
from huoyan.engine.scheduler import Scheduler
from huoyan.engine.sizing import CacheSize, limit_torch, size_cache, way_of_model
from huoyan.engine.stats import EngineStats
from huoyan.errors import HuoyanError, InputError
from huoyan.kernels import decode_kernels_enabled
from huoyan.layers.int4 import forget_scratches
from huoyan.layers.linear import lay_out_for_cpu, lay_out_for_cuda
from huoyan.planning.graphs import captured_rows
from huoyan.planning.memory import slice_bytes
from huoyan.planning.pieces import PICTURE_SLICES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huoyan.api.outputs import RequestOutput
    from huoyan.engine.request import EngineRequest
    from huoyan.engine.sampler import BeamCandidates
    from huoyan.engine.schedule import Schedule
    from huoyan.engine.sequence import Group
    from huoyan.engine.sequence import Sequence as EngineSequence
    from huoyan.kernels.compile_helper import CompileHelper
    from huoyan.models.minicpmv import MiniCPMV
    from huoyan.prompt.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Engine:
    """Implements `huoyan.backends.base.Backend` on one device. One thread calls it."""

    def __init__(
        self,
        model: MiniCPMV,
        config: EngineConfig | None = None,
        *,
        eos_token_id: int | None = None,
        stop_token_ids: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
        helper: CompileHelper | None = None,
    ) -> None:
        """`model` lies on its device already; the KV cache takes what `config` leaves it there.

        `eos_token_id` and `stop_token_ids` are the checkpoint's. Without a tokenizer
        answers have token ids only. `helper` compiles kernels.

        Raises:
            CapacityError: the memory does not hold the context.
        """
        self.config = config or EngineConfig()
        if decode_kernels_enabled() and not model.config.text.tie_word_embeddings:
            lay_out_for_cuda(model.llm.lm_head)
        self.size: CacheSize = size_cache(self.config, model)
        limit_torch(self.size.torch_bytes, model.device)
        text = model.config.text
        lay_out_for_cpu(model)
        self.model = model
        self.vocab_size = text.vocab_size
        self._eos_token_id = eos_token_id
        self._stop_token_ids = tuple(stop_token_ids)
        self._tokenizer = tokenizer
        self.pool = BlockPool(self.size.num_blocks, self.config.block_size, self.config.enable_prefix_caching)
        self.pictures = PictureCache(
            self.config.picture_cache_bytes, slice_bytes(model.config, model.dtype.itemsize)
        )
        self.scheduler = Scheduler(
            self.pool,
            self.pictures,
            max_model_len=self.size.max_model_len,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            max_encoder_slices=self.config.max_encoder_slices,
        )
        cache = KVCache(
            text.num_hidden_layers,
            self.size.num_blocks,
            self.config.block_size,
            text.num_key_value_heads,
            text.head_dim,
            model.dtype,
            model.device,
            self.config.kv_cache_dtype,
        )
        fused = has_fused_attention(model, cache.format.name)
        graphs = step_graphs = shared = None
        # Graphs are captured where steps run, and not on the default stream: so steps run on another.
        self._stream: torch.cuda.Stream | None = None
        if fused and not self.config.enforce_eager:
            from huoyan.engine.decode_graph import DecodeGraphs
            from huoyan.engine.graph_memory import GraphMemory
            from huoyan.engine.step_graph import StepGraphs
            from huoyan.kernels.int4_cuts import is_roomy

            shared = GraphMemory.of(model)
            int4 = way_of_model(model, self.config).int4
            rows = captured_rows(self.config.max_num_seqs, int4)
            graphs = DecodeGraphs(model, cache, rows, self.size.max_model_len, shared.pool)
            step_graphs = StepGraphs(
                model,
                cache,
                shared,
                max_num_batched_tokens=self.config.max_num_batched_tokens,
                max_num_seqs=self.config.max_num_seqs,
                max_model_len=self.size.max_model_len,
                decodes_alone=rows,
                whole_tiles=int4 == "words" and is_roomy(model.device),
            )
            self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self.run_ahead = fused if self.config.run_ahead is None else self.config.run_ahead
        # On a device without our kernels attention is planned on the host, which must know the beams' blocks.
        on_device = self.run_ahead and (fused or model.device.type == "cpu")
        self._device_beams = DeviceBeams(cache, text.vocab_size) if on_device else None
        self.runner = Runner(
            model,
            cache,
            self.pictures,
            self.config.max_encoder_slices,
            self.size.limits.encoder_patches,
            graphs=graphs,
            step_graphs=step_graphs,
            device_beams=self._device_beams,
            shared=shared,
        )
        self.scheduler.encodes_beside = self.runner.encoder.runs_beside
        if self._stream is not None:
            # Weights may still be on their way there.
            self._stream.wait_stream(torch.cuda.current_stream(model.device))
        if self.config.capture_at_start and self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._capture_all(helper)
        stops = frozenset(self._stop_token_ids) | (
            {eos_token_id} if eos_token_id is not None else frozenset()
        )
        self._chooser = Chooser(self.config.seed, text.vocab_size, tokenizer, stops, self._device_beams)
        self._speculator = Speculator(self.config.speculation) if self.config.speculation else None
        self._in_flight: InFlight | None = None
        self._groups: dict[str, Group] = {}
        self._steps = self._prompt_tokens = self._generated_tokens = self._preemptions = 0
        self._ended: list[RequestOutput] = []
        """Outputs of requests that ended outside of a step."""

    def _capture_all(self, helper: CompileHelper | None) -> None:
        try:
            self.runner.capture_all(helper)
        except RuntimeError as error:
            log.warning("CUDA graphs are captured when they are needed: %s", str(error).splitlines()[0])

    # -- Backend --------------------------------------------------------------------------------------------

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request. Raises InputError where it can never run."""
        if request.request_id in self._groups:
            raise InputError(f"a request {request.request_id!r} is running already: give it another id")
        params = request.params
        check_request(request, self.vocab_size, self.model.config.query_num)
        self._check_size(request)
        rules = StopRules.of(params, self._eos_token_id, self._stop_token_ids)
        width = params.num_sequences
        self._chooser.check(params)
        group = self.scheduler.add(request, width, params.max_tokens)
        words = AnswerText.of(params, self._tokenizer) if self._tokenizer and params.detokenize else None
        answer = Answer(rules, words, group.max_length - group.prompt_len)
        group.sequences[0].answer = answer
        group.answers.append(answer)
        if params.use_beam_search:
            longest = max(group.prompt_len + (params.max_tokens or 0), self.size.max_model_len)
            group.beams = BeamSearch(params, group.prompt_len, longest, self._eos_token_id)
            group.advances_on_device = self._device_beams is not None and self._device_beams.takes(
                group.beams
            )
        if params.prompt_logprobs is not None:
            group.prompt_logprobs = [None] * group.prompt_len
        self._groups[request.request_id] = group

    def abort_request(self, request_id: str) -> None:
        """End a request early; the next step returns it with finish_reason "abort"."""
        group = self._groups.get(request_id)
        if group is not None:
            for answer in group.live_answers:
                answer.finish("abort")
            shown = shown_answers(group)
            self._end(group)
            self._ended.append(request_output(group, shown))

    def wake(self) -> None:
        """Nothing to do: a step waits for nobody but the device."""

    def has_unfinished_requests(self) -> bool:
        return bool(self._groups or self._ended)

    def step(self) -> list[RequestOutput]:
        """Schedule, encode pictures, forward, choose tokens. One request's fault ends that request only.

        Where the engine runs ahead, the step is launched before the tokens of the one before it are looked at,
        and its own outputs come with the next call.
        """
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        outputs, self._ended = self._ended, []
        before, self._in_flight = self._in_flight, None
        if before is not None and not self._may_run_ahead():
            self._land(before, outputs)
            before = None
        launched = self._launch(before, outputs)
        if before is not None:
            self._land(before, outputs)
        if launched is not None and self.run_ahead and self._may_run_ahead():
            self._in_flight = launched
        elif launched is not None:
            self._land(launched, outputs)
        return outputs

    def _may_run_ahead(self) -> bool:
        """Whether the next step can be launched before the host knows the tokens of this one.

        One group that cannot keeps all in step: it would take every second step only. So does one whose tokens
        are guessed, until its guesses keep failing.
        """
        running = self.scheduler.running
        guessing = self._speculator is not None and any(map(self._speculator.is_guessing, running))
        return not guessing and not any(group.needs_host for group in running)

    def _launch(self, before: InFlight | None, outputs: list[RequestOutput]) -> InFlight | None:
        """Hand a step to the device; None where there is nothing to do."""
        schedule = self.scheduler.schedule()
        self._preemptions += len(schedule.preempted)
        if self._speculator is not None:
            # As many logits as there would be of a full batch, which needs no guesses.
            most_rows = max(self.config.max_num_seqs, 1 + self._speculator.config.num_speculative_tokens)
            self.scheduler.add_drafts(schedule, self._speculator.propose, most_rows)
        if schedule.pictures:
            schedule = self._encode(schedule, outputs)
        if not schedule.num_tokens:
            return None
        try:
            forward = self.runner.forward(schedule, before)
        except Exception as error:
            self._fail_all({chunk.sequence.group for chunk in schedule.chunks}, error, outputs)
            return None
        self.scheduler.launched(schedule)
        self._steps += 1
        self._prompt_tokens += sum(chunk.num_tokens for chunk in schedule.prefills)
        self._read_prompts(forward)
        rows: dict[Group, list[int]] = {}
        drafts: dict[Group, tuple[int, ...]] = {}
        row = 0
        for chunk in forward.chunks:
            group, count = chunk.sequence.group, 1 + len(chunk.drafts)
            if group in rows:
                rows[group].extend(range(row, row + count))
            else:
                rows[group] = [row] if count == 1 else list(range(row, row + count))
            row += count
            if chunk.drafts:
                drafts[group] = chunk.drafts
        return InFlight.of(self._chooser.choose(forward.logits, rows, before, drafts), rows, drafts)

    def close(self) -> None:
        """Free the device's memory. The engine cannot be used afterwards."""
        for request_id in list(self._groups):
            self.abort_request(request_id)
        self._ended.clear()
        self._in_flight = None
        self.pictures.clear()
        device = self.model.device
        del self.runner, self.model
        forget_scratches(self._stream.cuda_stream if self._stream else 0)
        limit_torch(None, device)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def stats(self) -> EngineStats:
        """What is going on now, and what has been done."""
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self._groups) - len(self.scheduler.running),
            blocks_used=self.pool.num_blocks - self.pool.num_free,
            blocks_total=self.pool.num_blocks,
            blocks_cached=self.pool.num_cached,
            picture_bytes=self.pictures.used_bytes,
            picture_hits=self.pictures.hits,
            picture_misses=self.pictures.misses,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
            draft_tokens=self._speculator.drafted if self._speculator else 0,
            accepted_tokens=self._speculator.accepted if self._speculator else 0,
        )

    @property
    def takes_originals(self) -> bool:
        """Whether pictures that nobody has resized yet are welcome: the device does that."""
        return self.runner.encoder.takes_originals

    # -- the parts of a step --------------------------------------------------------------------------------

    def _encode(self, schedule: Schedule, outputs: list[RequestOutput]) -> Schedule:
        failed = self.runner.encode(schedule.pictures, beside=schedule.encodes_beside)
        if not failed:
            return schedule
        hit = {}
        for group in self.scheduler.running:
            for use in group.pictures:
                if use.key in failed and use.key in group.pinned:
                    hit[group] = failed[use.key]
        for group, error in hit.items():
            self._fail_all({group}, error, outputs)
        return schedule.without(set(hit))

    def _read_prompts(self, forward: ForwardOutput) -> None:
        for chunk, hidden in forward.prompt_hidden:
            group = chunk.sequence.group
            entries = group.prompt_logprobs
            assert entries is not None
            end = min(chunk.end, group.prompt_len - 1)
            if end <= chunk.start:
                continue
            ids = torch.from_numpy(group.prompt_ids[chunk.start + 1 : end + 1].copy()).to(hidden.device)
            found = prompt_logprobs(
                hidden[: end - chunk.start],
                ids,
                self.model.logits,
                self.vocab_size,
                group.params.prompt_logprobs or 0,
            )
            entries[chunk.start + 1 : end + 1] = found

    def _land(self, step: InFlight, outputs: list[RequestOutput]) -> None:
        """Learn a launched step's tokens. Requests and sequences that ended meanwhile have no use for theirs."""
        try:
            chosen = step.choice.read()
        except Exception as error:
            self._fail_all({group for group in step.groups if not group.finished}, error, outputs)
            return
        now = monotonic()
        for group, tokens in chosen.items():
            if group.finished:
                continue
            if isinstance(tokens, Exception):
                self._fail_all({group}, tokens, outputs)
                continue
            if group.metrics.first_token_time is None:
                group.metrics.first_token_time = now
            try:
                if group.beams is not None:
                    found = cast("list[BeamCandidates] | DecidedBeams", tokens)
                    self._extend_beams(group, group.beams, found)
                elif group in step.drafts:
                    self._extend_verified(group, step.drafts[group], cast("list[ChosenToken]", tokens))
                else:
                    self._extend(group, cast("list[ChosenToken]", tokens))
            except Exception as error:
                self._fail_all({group}, error, outputs)
                continue
            if group.request.streamed or group.finished:
                outputs.append(request_output(group, shown_answers(group)))

    def _extend(self, group: Group, tokens: list[ChosenToken]) -> None:
        """Append one token to each of the group's sequences; the first step of several samples forks them."""
        first = group.sequences[0]
        if group.width == 1:
            self.scheduler.sampled(first, tokens[0].token_id)
            self._generated_tokens += 1
            if first.answer.append(tokens[0]):
                self.scheduler.finish_sequence(first)
                self._end(group)
            return
        while len(group.sequences) < len(tokens):
            group.answers.append(self._fork(first, len(group.sequences)).answer)
        for seq, token in zip(group.sequences.copy(), tokens, strict=True):
            self.scheduler.sampled(seq, token.token_id)
            self._generated_tokens += 1
            if seq.answer.append(token):
                self.scheduler.finish_sequence(seq)
        if not group.sequences:
            self._end(group)

    def _extend_verified(self, group: Group, drafts: tuple[int, ...], tokens: list[ChosenToken]) -> None:
        """Append the tokens up to the first that was not guessed: each is the one a step of its own would give."""
        seq = group.sequences[0]
        right = 0
        while right < len(drafts) and tokens[right].token_id == drafts[right]:
            right += 1
        taken: list[int] = []
        ended = False
        for token in tokens[: right + 1]:
            taken.append(token.token_id)
            ended = seq.answer.append(token)
            if ended:
                break
        self.scheduler.verified(seq, taken)
        self._generated_tokens += len(taken)
        assert self._speculator is not None
        self._speculator.learn(seq, drafts, right)
        if ended:
            self.scheduler.finish_sequence(seq)
            self._end(group)

    def _extend_beams(
        self, group: Group, search: BeamSearch, found: list[BeamCandidates] | DecidedBeams
    ) -> None:
        """Let the best beams live on: the first child of a beam takes its place, the others fork off it."""
        parents = group.sequences.copy()
        candidates = found.candidates[: len(parents)] if isinstance(found, DecidedBeams) else found
        survivors = search.advance(group.live_answers, candidates)
        if isinstance(found, DecidedBeams):
            found.check(survivors, search.width)
        # Where the device has gone on with them, beams without children have lent their blocks to the others.
        gone_on = parents[0].num_in_flight > 1
        fertile = {survivor.parent for survivor in survivors}
        childless = iter([seq for i, seq in enumerate(parents) if i not in fertile])
        children: list[EngineSequence] = []
        placed: set[int] = set()
        for survivor in survivors:
            child = parent = parents[survivor.parent]
            if survivor.parent in placed and gone_on:
                child = next(childless)
                self.scheduler.take_over(child, parent)
            elif survivor.parent in placed:
                child = self._fork(parent, len(group.sequences))
            children.append(child)
            placed.add(survivor.parent)
        for parent in parents:
            if parent not in children:
                self.scheduler.finish_sequence(parent)
        for child, survivor in zip(children, survivors, strict=True):
            self.scheduler.sampled(child, survivor.token_id)
            self._generated_tokens += 1
            child.answer = survivor.answer
        group.sequences[:] = children
        if not children:
            self._end(group)

    def _fork(self, parent: EngineSequence, index: int) -> EngineSequence:
        child = self.scheduler.fork(parent, index)
        child.answer = parent.answer.fork()
        self._chooser.forked(parent, child)
        return child

    # -- ends -----------------------------------------------------------------------------------------------

    def _end(self, group: Group) -> None:
        self.scheduler.finish(group)
        self._chooser.forget(group)
        if self._speculator is not None:
            self._speculator.forget(group)
        del self._groups[group.request_id]

    def _fail_all(self, groups: set[Group], error: Exception, outputs: list[RequestOutput]) -> None:
        if isinstance(error, HuoyanError):
            message = str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            log.error("a step ran out of memory", exc_info=error)
            message = (
                "the device ran out of memory where the plan had room: lower max_num_batched_tokens or "
                "max_num_seqs, and please report it"
            )
        else:
            log.error("a step failed", exc_info=error)
            reason = " ".join(str(error).split())
            message = f"internal error, please report it: {type(error).__name__}: {reason}"
        for group in sorted(groups, key=lambda g: g.order):
            self._end(group)
            outputs.append(request_output(group, [], message))

    # -- requests -------------------------------------------------------------------------------------------

    def _check_size(self, request: EngineRequest) -> None:
        """Raise InputError where a picture is larger than what was set aside for one."""
        side = self.model.config.vision.patch_size
        most_slices = max(self.pictures.capacity_bytes // self.pictures.bytes_per_slice, PICTURE_SLICES)
        for picture in request.pictures:
            if picture.num_slices > most_slices:
                raise InputError(
                    f"a picture has {picture.num_slices} slices, and {most_slices} of one picture have room: lower "
                    "max_slice_nums"
                )
            largest = max(picture.patches(side))
            if largest > self.config.max_slice_patches:
                raise InputError(
                    f"a slice of a picture has {largest} patches, and {self.config.max_slice_patches} have room: "
                    "cut the picture into pieces"
                )
