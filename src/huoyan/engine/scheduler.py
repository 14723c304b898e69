"""Continuous batching: which tokens of which requests the next step computes, and in which blocks.

One budget of tokens a step. Sequences that decode come first, then prompts that are partly computed, then
waiting requests, each in the order of arrival; those of a few requests that only count together wait for prompts
that fill a step (see `prompts_first`). When blocks run out, the request that arrived last gives its
own back and is computed again later, its answer so far included. Only lengths are looked at here, never
sampled ids, so that a step can be planned while the one before is still running.
"""

from __future__ import annotations

from collections import deque
from itertools import chain, islice
from time import monotonic
from typing import TYPE_CHECKING

from huoyan.engine.prompts_first import prompts_come_first
from huoyan.engine.request import check_room
from huoyan.engine.schedule import Chunk, Schedule
from huoyan.engine.sequence import Group, GroupStatus, Sequence
from huoyan.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from huoyan.engine.block_pool import BlockPool
    from huoyan.engine.picture_cache import PictureCache
    from huoyan.engine.request import EngineRequest


class Scheduler:
    """Owns requests, sequences and their blocks. It knows neither tensors nor text."""

    def __init__(
        self,
        pool: BlockPool,
        pictures: PictureCache,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_encoder_slices: int,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise InputError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs "
                f"({max_num_seqs}): each running sequence decodes one token a step"
            )
        self.pool = pool
        self.pictures = pictures
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_encoder_slices = max_encoder_slices
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []
        """In the order of arrival: admission is in that order, and the last one is preempted first."""
        self.encodes_beside = False
        """Whether pictures can be encoded while steps run, on a stream of their own. A prompt then waits for its
        picture as long as there are decodes to go on with, instead of letting them wait."""
        self._num_added = 0
        # Room for decodes to grow into, so that an admission is not followed by a preemption at once.
        self.watermark = max(1, pool.num_blocks // 100)

    # -- requests come and go -------------------------------------------------------------------------------

    def add(self, request: EngineRequest, width: int, max_tokens: int | None) -> Group:
        """Queue a request of `width` sequences and `max_tokens` new tokens (None: all there is room for).

        Raises:
            InputError: it could never run here; the message has the numbers.
        """
        check_room(request, width, self.max_model_len, self.max_num_seqs)
        prompt_len = len(request.prompt.token_ids)
        room = self._longest(prompt_len, width)
        if room <= prompt_len:
            raise InputError(
                f"the prompt of {prompt_len} tokens with {width} sequence(s) needs "
                f"{self._worst_case_blocks(prompt_len, width)} blocks of {self.pool.block_size} tokens, but "
                f"the KV cache has {self.pool.num_blocks}: shorten it or give the cache more memory"
            )
        wanted = (
            self.max_model_len if max_tokens is None else min(self.max_model_len, prompt_len + max_tokens)
        )
        group = Group(request, self._num_added, self.pool.block_size, width, min(wanted, room))
        if room < wanted and max_tokens is not None:
            group.warnings.append(
                f"the KV cache holds {room - prompt_len} tokens for each of {width} answers to this prompt, "
                f"{max_tokens} were asked for"
            )
        self._num_added += 1
        self.waiting.append(group)
        return group

    def finish(self, group: Group) -> None:
        """End a request, wherever it is, and free what it holds. Finishing twice is harmless."""
        if group.finished:
            return
        if group.status is GroupStatus.RUNNING:
            self.running.remove(group)
            for seq in group.sequences:
                self._release(seq)
            self._unpin(group, group.pinned)
        # A waiting group holds nothing; it leaves the queue when its turn comes.
        group.status = GroupStatus.FINISHED

    def finish_sequence(self, seq: Sequence) -> None:
        """End one sequence of a group that goes on."""
        seq.group.sequences.remove(seq)
        self._release(seq)

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """A new sequence of the same group with the parent's tokens, sharing all of its blocks."""
        child = Sequence(parent.group, index)
        child.output_ids = parent.output_ids.copy()
        child.block_table = parent.block_table.copy()
        child.block_hashes = parent.block_hashes.copy()
        child.num_computed = parent.num_computed
        child.num_in_flight = parent.num_in_flight
        child.num_registered = parent.num_registered
        for block in child.block_table:
            self.pool.share(block)
        parent.group.sequences.append(child)
        return child

    def take_over(self, seq: Sequence, parent: Sequence) -> None:
        """`seq`, whose own line has ended, goes on as another child of `parent`: it shares all of its blocks but the
        current one, which it has of its own, with contents that the step under way copies there."""
        for i in range(len(seq.block_table) - 2, -1, -1):
            own, shared = seq.block_table[i], parent.block_table[i]
            if own != shared:
                self.pool.share(shared)
                self.pool.release(own)
                seq.block_table[i] = shared
        seq.output_ids = parent.output_ids.copy()
        seq.block_hashes = parent.block_hashes.copy()
        seq.num_registered = parent.num_registered

    @property
    def has_unfinished(self) -> bool:
        self._drop_finished()
        return bool(self.running or self.waiting)

    # -- one step -------------------------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        """Plan the next step. Blocks are taken and copies ordered; nothing counts as computed yet."""
        if prompts_come_first(self):
            out = self._planned(decodes=False)
            if out.prefills or out.pictures:
                return out
        return self._planned(decodes=True)

    def _planned(self, decodes: bool) -> Schedule:
        out = Schedule()
        unready: list[Group] = []
        for group in self.running.copy():
            if group.status is not GroupStatus.RUNNING:
                continue
            if (
                decodes
                and group.width == 1
                and (chunk := self._next_in_place(group.sequences[0])) is not None
            ):
                out.decodes.append(chunk)
            elif not group.ready:
                unready.append(group)
            elif decodes and not group.awaits_host:
                self._decode(group, out)
        out.encodes_beside = (
            self.encodes_beside and bool(out.decodes) and not self._pictures_queue_up(unready)
        )
        budget = self.max_num_batched_tokens - len(out.decodes)
        for group in unready:
            if budget and group.status is GroupStatus.RUNNING:
                budget -= self._prefill(group, budget, out)
        self._drop_finished()
        while budget and self.waiting and not out.preempted:
            group = self.waiting[0]
            if not self._admit(group, budget, out):
                break
            self.waiting.popleft()
            self.running.append(group)
            budget -= self._prefill(group, budget, out)
            self._drop_finished()
        return out

    def add_drafts(
        self, schedule: Schedule, propose: Callable[[Sequence, int], list[int]], most_rows: int
    ) -> None:
        """Let decodes verify guesses with the tokens and blocks that the step leaves; nothing else changes.

        `propose(sequence, most)` guesses up to `most` next tokens; `most_rows`: logits of the step at most.
        """
        size = self.pool.block_size
        rows = sum(chunk.samples for chunk in schedule.chunks)
        budget = min(self.max_num_batched_tokens - schedule.num_tokens, most_rows - rows)
        for i, chunk in enumerate(schedule.decodes):
            seq = chunk.sequence
            if seq.group.width > 1 or seq.num_in_flight:
                continue
            slots = (len(seq.block_table) + self.pool.num_free) * size - chunk.end
            # After n right guesses one more token follows.
            most = min(budget, slots, seq.group.max_length - seq.length - 1)
            drafts = propose(seq, most) if most > 0 else []
            if not drafts:
                continue
            end = chunk.end + len(drafts)
            while len(seq.block_table) * size < end:
                seq.block_table.append(self.pool.allocate())
            schedule.decodes[i] = Chunk(seq, chunk.start, end, True, tuple(drafts))
            budget -= len(drafts)

    def launched(self, schedule: Schedule) -> None:
        """The step was handed to the device: its tokens count as computed from here on, guesses not yet."""
        for chunk in schedule.chunks:
            seq = chunk.sequence
            if seq.group.status is not GroupStatus.RUNNING:
                continue
            seq.num_computed = chunk.end - len(chunk.drafts)
            seq.has_drafts = bool(chunk.drafts)
            if chunk.samples:
                seq.num_in_flight += 1
            self._register(seq)
            group = seq.group
            if group.pinned:
                # Only a picture that the next chunk goes on with: others, if they come again, may go meanwhile.
                still = {u.key for u in group.pictures if u.start < seq.num_computed < u.end}
                self._unpin(group, group.pinned - still)

    def sampled(self, seq: Sequence, token_id: int) -> None:
        """The host learns a token of a launched step."""
        seq.num_in_flight -= 1
        seq.output_ids.append(token_id)

    def verified(self, seq: Sequence, token_ids: list[int]) -> None:
        """The host learns what a launched step with guesses gave: those that were right, and one token more.

        Blocks that only wrong guesses were written to are given back; full ones become findable now.
        """
        seq.num_in_flight -= 1
        seq.has_drafts = False
        seq.output_ids.extend(token_ids)
        seq.num_computed += len(token_ids) - 1
        needed = -(-seq.num_computed // self.pool.block_size)
        self.pool.release_table(seq.block_table[needed:])
        del seq.block_table[needed:]
        self._register(seq)

    def check(self) -> None:
        """Hold all books together. Raises AssertionError; meant for tests."""
        live = [seq for group in self.running for seq in group.sequences]
        self.pool.check(seq.block_table for seq in live)
        for group in self.waiting:
            assert all(not seq.block_table and not seq.num_computed for seq in group.sequences)
        for seq in live:
            assert not seq.has_drafts, seq
            assert len(seq.block_table) * self.pool.block_size >= seq.num_computed, seq
        orders = [group.order for group in self.running]
        assert orders == sorted(orders), "running requests out of order"
        waiting = [group.order for group in self.waiting if not group.finished]
        assert waiting == sorted(waiting), "waiting requests out of order"
        assert sum(group.seats for group in self.running) <= self.max_num_seqs
        pinned: dict[bytes, int] = {}
        for group in self.running:
            for key in group.pinned:
                pinned[key] = pinned.get(key, 0) + 1
        self.pictures.check(pinned)

    # -- decode ---------------------------------------------------------------------------------------------

    def _next_in_place(self, seq: Sequence) -> Chunk | None:
        """The decode of a sequence that is a group by itself, where nothing stands against it and its last block has
        room: what `_decode` does in most steps of most groups, without its bookkeeping."""
        group = seq.group
        start = seq.num_computed
        length = group.prompt_len + len(seq.output_ids) + seq.num_in_flight
        if length - start != 1 or start < group.prompt_len:
            return None
        index, table = start // self.pool.block_size, seq.block_table
        if index == len(table) or self.pool.ref_count(table[index]) > 1:
            return None
        if seq.num_in_flight and (seq.has_drafts or length >= group.max_length or group.needs_host):
            return None
        return Chunk(seq, start, length, True)

    def _decode(self, group: Group, out: Schedule) -> None:
        while self._blocks_to_step(group) > self.pool.num_free:
            # Those after `group` are not scheduled yet, so none of this step's work is lost.
            victim = self.running[-1]
            self._preempt(victim)
            out.preempted.append(victim)
            if victim is group:
                return
        for seq in group.sequences:
            self._make_room(seq, out)
            start = seq.num_computed
            out.decodes.append(Chunk(seq, start, start + 1, True))

    def _blocks_to_step(self, group: Group) -> int:
        """New blocks that a decode step of the group takes: where a block is full, or shared and not full."""
        needed = 0
        owners: dict[int, int] = {}
        for seq in group.sequences:
            index = seq.num_computed // self.pool.block_size
            if index == len(seq.block_table):
                needed += 1
                continue
            block = seq.block_table[index]
            left = owners.get(block, self.pool.ref_count(block))
            if left > 1:
                needed += 1
                owners[block] = left - 1
        return needed

    def _make_room(self, seq: Sequence, out: Schedule) -> None:
        """Give the sequence a block of its own for its next token: a new one, or a copy of a shared one."""
        index = seq.num_computed // self.pool.block_size
        if index == len(seq.block_table):
            seq.block_table.append(self.pool.allocate())
            return
        block = seq.block_table[index]
        if self.pool.ref_count(block) > 1:
            copy = self.pool.allocate()
            self.pool.release(block)
            seq.block_table[index] = copy
            out.copies.append((block, copy))

    # -- prefill --------------------------------------------------------------------------------------------

    def _prefill(self, group: Group, budget: int, out: Schedule) -> int:
        """Schedule what fits of the group's uncomputed tokens; returns how many."""
        used = 0
        for seq in group.sequences:
            # Sequences in lockstep leave their last token to a decode step that they take together.
            target = seq.length - 1 if group.in_lockstep else seq.length
            if seq.num_computed >= target:
                continue
            start = seq.num_computed
            end = self._fit_pictures(group, start, min(target, start + budget - used), out)
            if end > start:
                out.prefills.append(Chunk(seq, start, end, end == seq.length))
                used += end - start
            if end < target:
                break
        return used

    def _fit_pictures(self, group: Group, start: int, end: int, out: Schedule) -> int:
        """Pin the pictures that [start, end) needs and order their encoding; returns how far that reaches."""
        aside = out.encodes_beside
        # One batch at a time: those that queue up behind it would fill the queue of the decodes' kernels too.
        busy = aside and self.pictures.encoding
        ordered = {picture.key for picture in out.pictures}
        num_slices = sum(picture.num_slices for picture in out.pictures)
        for use in group.pictures:
            first = next((run for run in use.runs if run.end > start), None)
            if first is None or first.start >= end:
                continue
            if use.key not in self.pictures:
                # One picture a step may exceed the limits, else one that is larger than them could never run.
                alone = not ordered
                if busy or (num_slices + use.num_slices > self.max_encoder_slices and not alone):
                    end = min(end, max(first.start, start))
                    continue
                force = alone and not out.prefills and first.start <= start
                if not self.pictures.reserve(use.key, use.num_slices, force, group.pinned):
                    end = min(end, max(first.start, start))
                    continue
                out.pictures.append(group.request.pictures[use.index])
                ordered.add(use.key)
                num_slices += use.num_slices
            elif use.key not in group.pinned:
                self.pictures.hits += 1
            if use.key not in group.pinned:
                self.pictures.pin(use.key)
                group.pinned.add(use.key)
            if aside and not self.pictures.is_ready(use.key):
                end = min(end, max(first.start, start))
        return end

    def _pictures_queue_up(self, unready: list[Group]) -> bool:
        """Whether more pictures wait than is worth encoding beside decodes: small passes on two streams take longer
        than all of it one after the other, so with many the decodes get on faster where they wait, too."""
        if self.pictures.encoding:
            # What is under way has memory that a pass on the step's stream would take.
            return False
        left = self.max_encoder_slices // 2
        for group in islice(chain(unready, self.waiting), self.max_num_seqs):
            left -= sum(use.num_slices for use in group.pictures if use.key not in self.pictures)
            if left < 0:
                return True
        return False

    # -- admission and preemption ---------------------------------------------------------------------------

    def _admit(self, group: Group, budget: int, out: Schedule) -> bool:
        """Give a waiting group all the blocks of its known tokens, cached ones where there are any."""
        if sum(g.seats for g in self.running) + group.seats > self.max_num_seqs:
            return False
        if group.resumes_late:
            return False
        if group.resumption_unplanned:
            self._plan_resumption_by_tokens(group)
        pool, size = self.pool, self.pool.block_size
        cached: list[list[int]] = []
        needed = 0
        for seq in group.sequences:
            # At least one token is always computed: its logits are wanted.
            hits = pool.match(seq.hashes_up_to((seq.length - 1) // size)) if self._may_reuse(group) else []
            shared = seq.resume_from[1] if seq.resume_from else 0
            cached.append(hits if len(hits) > shared else [])
            needed += -(-seq.length // size) - max(len(hits), shared)
        for hits in cached:
            for block in hits:
                pool.share(block)
        if needed + (self.watermark if self.running else 0) > pool.num_free:
            for hits in cached:
                pool.release_table(hits)
            return False
        for seq, hits in zip(group.sequences, cached, strict=True):
            if hits:
                seq.block_table = hits
            elif seq.resume_from:
                parent, shared = seq.resume_from
                seq.block_table = parent.block_table[:shared]
                for block in seq.block_table:
                    pool.share(block)
            have = len(seq.block_table)
            seq.num_registered = have
            seq.num_computed = min(have * size, seq.length - 1)
            seq.block_table.extend(pool.allocate() for _ in range(-(-seq.length // size) - have))
        group.status = GroupStatus.RUNNING
        if group.metrics.first_scheduled_time is None:
            group.metrics.first_scheduled_time = monotonic()
            group.metrics.cached_prompt_tokens = group.sequences[0].num_computed
        return True

    def _may_reuse(self, group: Group) -> bool:
        """Log-probabilities of the prompt need every position of it computed."""
        wants_prompt = group.params.prompt_logprobs is not None and not group.sequences[0].output_ids
        return self.pool.enable_prefix_caching and not wants_prompt

    def _preempt(self, group: Group) -> None:
        """Take a running group's blocks; its tokens stay and are computed again when it is admitted."""
        if group.ready and group.advances_on_device:
            group.resumption_unplanned = True
        elif group.ready:
            self._plan_resumption(group)
        for seq in group.sequences:
            self._release(seq)
            seq.num_computed = 0
            seq.num_registered = 0
        self._unpin(group, group.pinned)
        self.running.remove(group)
        group.status = GroupStatus.WAITING
        group.metrics.preemptions += 1
        self.waiting.appendleft(group)

    def _plan_resumption(self, group: Group) -> None:
        """Remember which blocks the sequences shared, so that resuming takes no more blocks than there were.

        A group that is preempted while it is being resumed keeps its plan: its tokens have not changed.
        """
        owner_of: dict[int, Sequence] = {}
        for seq in group.sequences:
            seq.resume_from = None
            for i, block in enumerate(seq.block_table):
                owner = owner_of.get(block)
                if owner is None:
                    break
                seq.resume_from = (owner, i + 1)
            for block in seq.block_table:
                owner_of.setdefault(block, seq)

    def _plan_resumption_by_tokens(self, group: Group) -> None:
        """The same of a group whose sequences part or end after it has lost its blocks: those that have the same
        tokens share what is computed of them, and that is all that they shared before."""
        group.resumption_unplanned = False
        for i, seq in enumerate(group.sequences):
            seq.resume_from = None
            most, computed = 0, seq.length - 1
            for owner in group.sequences[:i]:
                pairs = zip(seq.output_ids, owner.output_ids, strict=True)
                alike = next((j for j, (a, b) in enumerate(pairs) if a != b), len(seq.output_ids))
                alike += group.prompt_len
                size = self.pool.block_size
                blocks = -(-computed // size) if alike >= computed else alike // size
                if blocks > most:
                    most, seq.resume_from = blocks, (owner, blocks)

    # -- bookkeeping ----------------------------------------------------------------------------------------

    def _register(self, seq: Sequence) -> None:
        if not self.pool.enable_prefix_caching:
            return
        full = min(seq.num_computed, seq.num_known) // self.pool.block_size
        if full > seq.num_registered:
            hashes = seq.hashes_up_to(full)
            for i in range(seq.num_registered, full):
                self.pool.register(seq.block_table[i], hashes[i])
            seq.num_registered = full

    def _release(self, seq: Sequence) -> None:
        self.pool.release_table(seq.block_table)
        seq.block_table = []

    def _unpin(self, group: Group, keys: Iterable[bytes]) -> None:
        for key in list(keys):
            self.pictures.unpin(key)
            group.pinned.discard(key)

    def _drop_finished(self) -> None:
        while self.waiting and self.waiting[0].finished:
            self.waiting.popleft()

    def _longest(self, prompt_len: int, width: int) -> int:
        """Tokens of prompt and answer for which `width` sequences surely fit (the last is never stored)."""
        size = self.pool.block_size
        shared = prompt_len // size if width > 1 else 0
        own = (self.pool.num_blocks - shared) // width
        return (shared + own) * size + 1 if own > 0 else 0

    def _worst_case_blocks(self, prompt_len: int, width: int) -> int:
        """Blocks that a prompt and a first token of `width` sequences may take."""
        size = self.pool.block_size
        shared = prompt_len // size if width > 1 else 0
        return shared + width * max(-(-prompt_len // size) - shared, 1)
