"""Beam search over vLLM: our policy (`huoyan.engine.beam`), fed with vLLM's log-probabilities.

vLLM has no beams in its engine. A run is one sequence of vLLM that starts at a beam and follows it greedily, and
reports at each token what else might follow. Where the search goes on with the token the run has chosen, the run
serves the next step too, and is often ahead already; where beams fork, new runs start, and find what they have in
common with the others in vLLM's prefix cache. Runs that no beam follows any more are aborted. What a run found
ahead of its beam is thrown away with it, so the outcome does not depend on how far ahead it was.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from huoyan.api.outputs import Logprob
from huoyan.backends.vllm.answering import Answering
from huoyan.backends.vllm.params import beam_params
from huoyan.engine.answer import Answer, ChosenToken, StopRules
from huoyan.engine.beam import BeamSearch
from huoyan.engine.sampler import BeamCandidates

if TYPE_CHECKING:
    from huoyan.api.outputs import TokenLogprobs
    from huoyan.backends.vllm.client import Client
    from huoyan.backends.vllm.logits import WholeVocabulary
    from huoyan.engine.request import EngineRequest
    from huoyan.prompt.tokenizer import Tokenizer


@dataclass(eq=False)
class Run:
    """A sequence of vLLM. `token_ids[i]` was chosen among `candidates[i]`."""

    run_id: str
    token_ids: list[int] = field(default_factory=list)
    candidates: list[BeamCandidates] = field(default_factory=list)
    ended: bool = False


@dataclass(eq=False)
class Beam:
    """A live beam: `answer`, and where the run that follows it stands."""

    answer: Answer
    run: Run
    at: int = 0
    """Its next candidates are `run.candidates[at]`."""

    @property
    def ready(self) -> bool:
        return self.at < len(self.run.candidates)


class Search(Answering):
    """One request that is a beam search."""

    def __init__(
        self,
        request: EngineRequest,
        client: Client,
        rules: StopRules,
        tokenizer: Tokenizer | None,
        room: int,
        beams: BeamSearch,
        whole: WholeVocabulary | None,
    ) -> None:
        """`whole`: where what vLLM reports has yet to be changed by the parameters."""
        super().__init__(request, client, room)
        self._rules = rules
        self._whole = whole
        self._counter = itertools.count()
        self._by_id: dict[str, Run] = {}
        self.beams = self._search = beams
        self._first = self.answer(rules, tokenizer)
        self._first_run: Run | None = None
        self._live: list[Beam] = []

    @property
    def live_answers(self) -> list[Answer]:
        return [beam.answer for beam in self._live]

    @property
    def knows_logprobs(self) -> bool:
        return True

    def start(self) -> None:
        self._client.check(self.request, self._run_params(self._first, first=True))
        self._first_run = self._start_run(self._first, first=True)
        self._live = [Beam(self._first, self._first_run)]

    def take(self, run_id: str, output: Any) -> bool:
        run = self._by_id.get(run_id)
        if run is None:
            return False
        if run is self._first_run:
            self.read_prompt(output)
        (completion,) = output.outputs
        beam = next((beam for beam in self._live if beam.run is run), None)
        for i, token_id in enumerate(completion.token_ids):
            if self._whole is None:
                run.candidates.append(self._candidates(completion.logprobs[i]))
            else:
                assert beam is not None
                run.candidates.append(self._whole.candidates(beam.answer, completion.logprobs))
            run.token_ids.append(token_id)
        if completion.finish_reason is not None:
            run.ended = True
            self.runs.discard(run_id)
        changed = False
        while self._live and all(beam.ready for beam in self._live):
            self._advance()
            changed = True
        return changed

    def _advance(self) -> None:
        """One step of the search, from candidates that are there."""
        found = [beam.run.candidates[beam.at] for beam in self._live]
        survivors = self._search.advance(self.live_answers, found)
        before, self._live = self._live, []
        for survivor in survivors:
            parent = before[survivor.parent]
            follows = parent.run.token_ids[parent.at] == survivor.token_id
            more = parent.at + 1 < len(parent.run.candidates) or not parent.run.ended
            if follows and more:
                self._live.append(Beam(survivor.answer, parent.run, parent.at + 1))
            else:
                self._live.append(Beam(survivor.answer, self._start_run(survivor.answer)))
        kept = {beam.run.run_id for beam in self._live}
        dropped = [run_id for run_id in self._by_id if run_id not in kept]
        for run_id in dropped:
            del self._by_id[run_id]
        ended = [run_id for run_id in dropped if run_id in self.runs]
        self.runs.difference_update(ended)
        self._client.abort(ended)

    def _start_run(self, answer: Answer, first: bool = False) -> Run:
        run = Run(f"{self.request.request_id}/{next(self._counter)}")
        token_ids = [*self.request.prompt.token_ids, *answer.token_ids]
        self._client.add(run.run_id, self.request, token_ids, self._run_params(answer, first))
        self._by_id[run.run_id] = run
        self.runs.add(run.run_id)
        return run

    def _run_params(self, answer: Answer, first: bool) -> Any:
        left = self.max_tokens - len(answer.token_ids)
        if self._whole is not None:
            return beam_params(self.params, self._rules, 1, -1, first)
        count = max(2 * self.width, self.params.logprobs or 0)
        return beam_params(self.params, self._rules, left, count, first)

    def _candidates(self, step: Any) -> BeamCandidates:
        """vLLM's entries of one position: the chosen token and the likeliest ones, in no order to rely on."""
        ranked = sorted(step.items(), key=lambda entry: (-entry[1].logprob, entry[0]))
        entries = [
            (int(token), Logprob(value.logprob, rank)) for rank, (token, value) in enumerate(ranked, 1)
        ]
        count = self.params.logprobs
        top: TokenLogprobs | None = None if count is None else dict(entries[:count])
        return BeamCandidates(
            [
                ChosenToken(token, own.logprob, None if top is None else {token: own, **top})
                for token, own in entries[: 2 * self.width]
            ]
        )
