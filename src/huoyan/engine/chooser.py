"""The step from logits to tokens: gathers what each sequence's choice depends on, and asks the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from huoyan.engine.answer import ChosenToken
from huoyan.engine.barred_tokens import BarredTokens
from huoyan.engine.noise import mix
from huoyan.engine.plain_draws import PlainDraws
from huoyan.engine.plain_tokens import PlainTokens, chooses_by_kernel
from huoyan.engine.sampler import (
    BeamCandidates,
    SampledTokens,
    SamplingRow,
    beam_candidates,
    sample,
)
from huoyan.engine.structured import GrammarCompiler, GrammarState
from huoyan.engine.token_counts import TokenCounts
from huoyan.layers.packed_attention import to_device
from huoyan.planning.pieces import CHOICE_LOGITS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from huoyan.api.sampling_params import SamplingParams
    from huoyan.engine.device_beams import BeamStep, DecidedBeams, DeviceBeams
    from huoyan.engine.in_flight import InFlight
    from huoyan.engine.sequence import Group, Sequence
    from huoyan.prompt.tokenizer import Tokenizer


class SequenceState:
    """What is kept between the steps of one sequence, where its request needs it."""

    def __init__(self, counts: TokenCounts | None, grammar: GrammarState | None) -> None:
        self.counts = counts
        self.grammar = grammar

    def fork(self) -> SequenceState:
        return SequenceState(
            self.counts.fork() if self.counts else None, self.grammar.fork() if self.grammar else None
        )


Chosen: TypeAlias = "list[ChosenToken] | list[BeamCandidates] | DecidedBeams | Exception"


@dataclass
class Choice:
    """What follows the sequences of a step: on the device at once, for the host when it is read."""

    sampled: dict[Group, int] = field(default_factory=dict)
    """How many tokens each group got, in the order in which they stand in `tokens`."""
    tokens: list[SampledTokens | PlainTokens] = field(default_factory=list)
    """A piece of the rows each."""
    candidates: dict[Group, list[BeamCandidates]] = field(default_factory=dict)
    beams: BeamStep | None = None
    """Of the searches that advance on the device."""
    failed: dict[Group, Exception] = field(default_factory=dict)

    @property
    def token_ids(self) -> Tensor | None:
        """int64 [tokens], on the device."""
        if not self.tokens:
            return None
        return self.tokens[0].ids if len(self.tokens) == 1 else torch.cat([part.ids for part in self.tokens])

    def read(self) -> dict[Group, Chosen]:
        """Waits until they are chosen."""
        out: dict[Group, Chosen] = {**self.failed, **self.candidates}
        if self.beams is not None:
            out.update(self.beams.read())
        found = [token for part in self.tokens for token in part.read()]
        first = 0
        for group, count in self.sampled.items():
            out[group] = found[first : first + count]
            first += count
        return out


class Chooser:
    """Chooses for one engine. Draws of requests without a seed depend on the engine's seed and their order."""

    def __init__(
        self,
        seed: int,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
        device_beams: DeviceBeams | None = None,
    ) -> None:
        self._draws = PlainDraws(seed)
        self._barred = BarredTokens()
        self._device_beams = device_beams
        self._vocab_size = vocab_size
        self._grammars = GrammarCompiler(tokenizer, vocab_size, stop_token_ids)
        self._states: dict[Group, dict[Sequence, SequenceState]] = {}
        self._compiled: dict[Group, GrammarState] = {}

    def check(self, params: SamplingParams) -> None:
        """Raise InputError where the parameters do not fit the vocabulary or their grammar is wrong."""
        params.check_vocabulary(self._vocab_size)
        if params.structured_outputs is not None:
            self._grammars.compile(params.structured_outputs)

    def choose(
        self,
        logits: Tensor,
        rows: Mapping[Group, list[int]],
        before: InFlight | None = None,
        drafts: Mapping[Group, tuple[int, ...]] | None = None,
    ) -> Choice:
        """One token for each of a group's sequences; for a beam search, the candidates of each live beam, and where
        it advances on the device what comes of them.

        Call it when the step counts as launched, before the host learns its tokens.

        Args:
            logits: [R, vocab] of any float dtype; what is chosen from is float32, a piece of the rows at a time.
            rows: for each group the rows of its sequences, in their order. The first step of several
                samples has one row for all of them.
            before: the step whose tokens the host does not know yet, where there is one.
            drafts: guesses of the one sequence of some groups, which has a row before them and one after each; it
                gets a token for every row, each as if the guesses before were right.
        """
        drafts = drafts or {}
        choice = Choice()
        draws = chooses_by_kernel(logits)
        plain = [
            g
            for g in rows
            if (g.takes_likeliest or (draws and (g.is_plain or g.takes_likeliest_but))) and g not in drafts
        ]
        if plain:
            some, scattered = _where([rows[group][0] for group in plain], logits)
            sequences = [group.sequences[0] for group in plain]
            how = self._draws.draws(some, scattered, sequences) if draws else None
            choice.tokens.append(PlainTokens(some, how, scattered, self._barred.of(sequences, logits.device)))
            choice.sampled = dict.fromkeys(plain, 1)
            if len(plain) == len(rows):
                return choice
            rows = {group: own for group, own in rows.items() if group not in choice.sampled}
        searches = {group: own for group, own in rows.items() if group.advances_on_device}
        if searches:
            self._advance(choice, logits, searches, before)
            rows = {group: own for group, own in rows.items() if group not in searches}
        prepared: dict[Group, list[SamplingRow]] = {}
        for group, own in rows.items():
            try:
                if group in drafts:
                    prepared[group] = self._draft_rows(group.sequences[0], drafts[group], logits.device)
                else:
                    prepared[group] = self._rows(group, len(own), logits.device, before)
            except Exception as error:  # noqa: PERF203 - one request's fault is not the others'
                choice.failed[group] = error
        sampled = [g for g in prepared if not g.params.use_beam_search]
        if sampled:
            index = [
                row
                for g in sampled
                for row, n in zip(rows[g], _repeats(g, rows[g]), strict=True)
                for _ in range(n)
            ]
            flat = [row for g in sampled for row in prepared[g]]
            choice.sampled |= {g: len(prepared[g]) for g in sampled}
            choice.tokens += [sample(some, part) for some, part in _pieces(logits, index, flat)]
        on_host = [g for g in prepared if g.params.use_beam_search]
        if on_host:
            index = [row for g in on_host for row in rows[g]]
            flat = [r for g in on_host for r in prepared[g]]
            candidates = (
                found for some, part in _pieces(logits, index, flat) for found in beam_candidates(some, part)
            )
            choice.candidates = {g: [next(candidates) for _ in prepared[g]] for g in on_host}
        return choice

    def forget(self, group: Group) -> None:
        """The group has ended."""
        self._states.pop(group, None)
        self._compiled.pop(group, None)

    def forked(self, parent: Sequence, child: Sequence) -> None:
        """`child` goes its own way from here; call it before either takes another token."""
        states = self._states.get(parent.group)
        if states is not None and parent in states:
            states[child] = states[parent].fork()

    def _advance(
        self, choice: Choice, logits: Tensor, searches: Mapping[Group, list[int]], before: InFlight | None
    ) -> None:
        """Let searches take a step on the device; those whose step before failed there fail with it."""
        assert self._device_beams is not None
        last = before.choice.beams if before is not None else None
        known = last.searches if last is not None else {}
        able = {g: own for g, own in searches.items() if g.sequences[0].num_in_flight == 1 or g in known}
        choice.failed |= {g: RuntimeError("its last step failed") for g in searches if g not in able}
        try:
            choice.beams = self._device_beams.advance(logits, able, last) if able else None
        except Exception as error:
            choice.failed |= dict.fromkeys(able, error)

    def _rows(
        self, group: Group, count: int, device: torch.device, before: InFlight | None
    ) -> list[SamplingRow]:
        params = group.params
        sequences = group.sequences[:count]
        first_of_several = count < group.width and not group.in_lockstep and not params.use_beam_search
        rows = []
        for seq in sequences:
            state = self._state(seq)
            in_flight = None
            has_counts = state is not None and state.counts is not None
            if has_counts and before is not None and seq.num_in_flight > 1:
                in_flight = before.token(seq)
            rows.append(self._row(seq, seq.output_ids, seq.num_outputs - 1, state, device, in_flight))
        if first_of_several:
            shared = rows[0]
            fields: dict[str, Any] = {k: v for k, v in vars(shared).items() if k != "key"}
            rows = [SamplingRow(**fields, key=self._key(group, i, 0)) for i in range(group.width)]
        return rows

    def _draft_rows(self, seq: Sequence, drafts: tuple[int, ...], device: torch.device) -> list[SamplingRow]:
        """As one step after the other would have them, were the drafts right; what is kept stays as it is."""
        state = self._state(seq)
        known = len(seq.output_ids)
        rows = [self._row(seq, seq.output_ids, known, state, device)]
        for i in range(1, len(drafts) + 1):
            # The rows before hold the state they were made from.
            state = state.fork() if state is not None else None
            rows.append(self._row(seq, [*seq.output_ids, *drafts[:i]], known + i, state, device))
        return rows

    def _row(
        self,
        seq: Sequence,
        output_ids: list[int],
        step: int,
        state: SequenceState | None,
        device: torch.device,
        in_flight: Tensor | None = None,
    ) -> SamplingRow:
        """After `output_ids`, and the token `in_flight` where the host does not know it; `step` tokens in all."""
        group, params = seq.group, seq.group.params
        counts = grammar = None
        if state is not None:
            counts, grammar = state.counts, state.grammar
            if counts is not None:
                counts.update(output_ids)
            if grammar is not None:
                grammar.update(output_ids)
        return SamplingRow(
            params,
            step,
            stop_token_ids=seq.answer.rules.held_back if params.min_tokens else frozenset(),
            counts=counts,
            in_flight=in_flight,
            allowed=grammar.allowed(device) if grammar is not None else None,
            key=self._key(group, seq.index, step) if params.temperature else 0,
        )

    def _key(self, group: Group, index: int, step: int) -> int:
        return mix(self._draws.request_key(group), index, step)

    def _state(self, seq: Sequence) -> SequenceState | None:
        group = seq.group
        params = group.params
        if not params.has_penalties and params.structured_outputs is None:
            return None
        states = self._states.setdefault(group, {})
        if seq not in states:
            counts = None
            if params.has_penalties:
                counts = TokenCounts(group.prompt_ids)
            grammar = None
            if params.structured_outputs is not None:
                if group not in self._compiled:
                    self._compiled[group] = self._grammars.compile(params.structured_outputs)
                grammar = self._compiled[group].fork()
            states[seq] = SequenceState(counts, grammar)
        return states[seq]


def _pieces(
    logits: Tensor, index: list[int], rows: list[SamplingRow]
) -> Iterator[tuple[Tensor, list[SamplingRow]]]:
    """Rows `index` of the logits in float32 with what belongs to each, a piece at a time."""
    step = max(CHOICE_LOGITS // logits.shape[1], 1)
    for first in range(0, len(index), step):
        yield _pick(logits, index[first : first + step]).float(), rows[first : first + step]


def _pick(logits: Tensor, index: list[int]) -> Tensor:
    """Rows `index` of the logits: where they stand together, as they are."""
    some, scattered = _where(index, logits)
    return some if scattered is None else some[scattered]


def _where(index: list[int], logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, and which of their rows are rows `index` of the given ones, int64 on the device; None for all of them."""
    first = index[0]
    if index == list(range(first, first + len(index))):
        return logits[first : first + len(index)], None
    # Not made on the device: that would wait for all that it has to do.
    return logits, to_device(torch.tensor(index), logits.device)


def _repeats(group: Group, rows: list[int]) -> list[int]:
    """How many choices each row gives: the first step of several samples has one row for all."""
    if len(rows) < group.width and not group.in_lockstep:
        return [group.width]
    return [1] * len(rows)
