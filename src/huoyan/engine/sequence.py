"""What the scheduler moves: sequences, and the groups of them that belong to one request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from huoyan.api.outputs import RequestMetrics
from huoyan.api.sampling_params import SAMPLING_EPS
from huoyan.engine.block_hash import ROOT, BlockHasher, SliceRun, slice_runs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from huoyan.api.outputs import TokenLogprobs
    from huoyan.engine.answer import Answer
    from huoyan.engine.beam import BeamSearch
    from huoyan.engine.request import EngineRequest


class GroupStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One line of tokens: the prompt, and one answer to it as far as it is known.

    `num_computed` counts the tokens whose keys and values are in the cache, or on their way into it in the
    step that was launched. A sequence with one token left to compute is ready to decode.
    """

    __slots__ = (
        "answer",
        "block_hashes",
        "block_table",
        "group",
        "has_drafts",
        "index",
        "num_computed",
        "num_in_flight",
        "num_registered",
        "output_ids",
        "resume_from",
    )

    answer: Answer
    """What it has said: set and read by the engine, never by the scheduler."""

    def __init__(self, group: Group, index: int = 0) -> None:
        self.group = group
        self.index = index
        self.output_ids: list[int] = []
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        """Digests of the first full blocks, as far as they were needed."""
        self.num_registered = 0
        """Blocks that the prefix cache has been told of (or that came from it)."""
        self.num_computed = 0
        self.num_in_flight = 0
        """Tokens sampled on the device that the host does not know yet; they count in `length`."""
        self.has_drafts = False
        """Whether the step in flight verifies guesses: how many tokens it gives is not known yet."""
        self.resume_from: tuple[Sequence, int] | None = None
        """After a preemption: share that many of that sequence's blocks instead of computing them again."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return self.group.prompt_len + len(self.output_ids) + self.num_in_flight

    @property
    def num_outputs(self) -> int:
        """Tokens of the answer, those in flight included."""
        return len(self.output_ids) + self.num_in_flight

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host knows."""
        return self.group.prompt_len + len(self.output_ids)

    def token_ids(self, start: int, end: int) -> NDArray[np.int64]:
        """Ids of the tokens [start, end), of prompt and answer."""
        prompt_len = self.group.prompt_len
        if end <= prompt_len:
            return self.group.prompt_ids[start:end]
        answer = np.asarray(self.output_ids[max(start - prompt_len, 0) : end - prompt_len], np.int64)
        if start >= prompt_len:
            return answer
        return np.concatenate([self.group.prompt_ids[start:], answer])

    def hashes_up_to(self, num_blocks: int) -> list[bytes]:
        """Digests of the first `num_blocks` blocks, all of whose tokens must be known."""
        hasher = self.group.hasher
        size = hasher.block_size
        while len(self.block_hashes) < num_blocks:
            i = len(self.block_hashes)
            parent = self.block_hashes[-1] if i else ROOT
            self.block_hashes.append(hasher.digest(parent, i, self.token_ids(i * size, (i + 1) * size)))
        return self.block_hashes[:num_blocks]

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.group.request_id}/{self.index} computed {self.num_computed} of {self.length}, "
            f"blocks {self.block_table}>"
        )


@dataclass
class PictureUse:
    """One picture of a request: its runs in the prompt, and its place among the request's pictures."""

    key: bytes
    num_slices: int
    runs: tuple[SliceRun, ...]
    index: int

    @property
    def start(self) -> int:
        return self.runs[0].start

    @property
    def end(self) -> int:
        return self.runs[-1].end


class Group:
    """A request in the engine, with its live sequences: one, the `best_of` samples, or the beams.

    It is scheduled and preempted as a whole.
    """

    def __init__(
        self, request: EngineRequest, order: int, block_size: int, width: int, max_length: int
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.params = request.params
        self.order = order
        self.width = width
        """Sequences it has at most."""
        self.max_length = max_length
        """Tokens of prompt and answer at which every sequence ends."""
        self.prompt_ids: NDArray[np.int64] = np.asarray(request.prompt.token_ids, np.int64)
        self.prompt_len = len(self.prompt_ids)
        runs = slice_runs(request.pictures, request.prompt.slots)
        self.hasher = BlockHasher(block_size, runs)
        uses = [
            PictureUse(picture.key, len(slot.offsets), tuple(r for r in runs if r.picture == i), i)
            for i, (picture, slot) in enumerate(zip(request.pictures, request.prompt.slots, strict=True))
        ]
        self.pictures = tuple(sorted(uses, key=lambda use: use.runs[0].start))
        self.status = GroupStatus.WAITING
        self.pinned: set[bytes] = set()
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.warnings: list[str] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.sequences: list[Sequence] = [Sequence(self)]
        self.answers: list[Answer] = []
        """All answers so far, ended ones too; of a beam search, see `beams`."""
        self.beams: BeamSearch | None = None
        """The search's finished hypotheses, where the request is a beam search."""
        self.advances_on_device = False
        """Whether it is a beam search whose steps the device can decide before the host knows the one before."""
        self.resumption_unplanned = False
        """It was preempted while a step was under way: which blocks its beams share is seen when they are known."""
        params = self.params
        self._needs_host = bool(
            width > 1 or params.prompt_logprobs is not None or params.structured_outputs is not None
        )
        greedy = params.temperature < SAMPLING_EPS
        self.is_plain = width == 1 and params.is_plain and not params.min_tokens
        """Whether it is one sequence whose next token depends on logits, temperature and filters only."""
        self.takes_likeliest = self.is_plain and greedy
        """Whether its next token is the likeliest one of the model's, and nothing else is asked about it."""
        self.takes_likeliest_but = width == 1 and params.is_plain and greedy and bool(params.min_tokens)
        """The same, but that there are tokens which may not be chosen before `min_tokens`."""

    @property
    def live_answers(self) -> list[Answer]:
        """The answers that still grow, in the order of `sequences`."""
        return [seq.answer for seq in self.sequences]

    @property
    def finished(self) -> bool:
        return self.status is GroupStatus.FINISHED

    @property
    def in_lockstep(self) -> bool:
        """Whether there are (or were) several sequences, which must take each decode step together."""
        return self.width > 1 and bool(self.sequences and self.sequences[0].output_ids)

    @property
    def ready(self) -> bool:
        """Whether the prompt is computed and each sequence has one token left: the group can decode."""
        prompt_len = self.prompt_len
        return all(
            seq.num_computed >= prompt_len and seq.length - seq.num_computed == 1 for seq in self.sequences
        )

    @property
    def resumes_late(self) -> bool:
        """Whether it waits again, and the host does not know its last token yet."""
        return self.status is GroupStatus.WAITING and any(seq.num_in_flight for seq in self.sequences)

    @property
    def seats(self) -> int:
        """What it counts for in `max_num_seqs`: samples that ended leave their seats, beams may return."""
        if self.width > 1 and self.in_lockstep and not self.params.use_beam_search:
            return len(self.sequences)
        return self.width

    @property
    def needs_host(self) -> bool:
        """Whether the host must know the tokens before the next step: because of forks, or of a grammar."""
        return self._needs_host and not self.advances_on_device

    @property
    def awaits_host(self) -> bool:
        """Whether nothing can be planned until the host has seen the tokens in flight.

        What guesses came to is not known, and a sequence of full length ends with the one in flight. Beams that
        are to become more need blocks.
        """
        waits = self.needs_host or (self.advances_on_device and len(self.sequences) < self.width)
        return any(
            seq.num_in_flight and (waits or seq.has_drafts or seq.length >= self.max_length)
            for seq in self.sequences
        )
