"""Beam search as vLLM 0.5.4 defines it: which beams live on, which are finished, and when to stop.

A step takes the 2k likeliest children of all live beams by cumulative log-probability. Those that end are
finished hypotheses; of all finished ones the best k are kept; of the others the best k live on. A hypothesis'
score is its cumulative log-probability / length ** length_penalty, where the length counts the prompt and the
answer without an end token. Only bookkeeping stands here: neither blocks nor tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.answer import Answer, ChosenToken
from huoyan.engine.sampler import BeamCandidates


@dataclass(frozen=True)
class Survivor:
    """A beam that lives on: `answer`, a child of live beam `parent` that ends in `token_id`."""

    parent: int
    token_id: int
    answer: Answer


class BeamSearch:
    """One request's search. `finished` are the hypotheses that ended, best first, `width` at most."""

    def __init__(
        self, params: SamplingParams, prompt_len: int, longest: int, eos_token_id: int | None
    ) -> None:
        """`longest`: tokens of prompt and answer that a sequence could ever have (for early_stopping "never")."""
        self.params = params
        self.width = params.num_sequences
        self.prompt_len = prompt_len
        self.longest = longest
        self.eos_token_id = eos_token_id
        self.finished: list[Answer] = []

    def score(self, answer: Answer, length: int | None = None) -> float:
        """What hypotheses compete by. `length` stands in for the answer's own, which leaves an end token out."""
        if length is None:
            ends = answer.token_ids[-1:] == [self.eos_token_id]
            length = self.prompt_len + len(answer.token_ids) - ends
        return float(answer.cumulative_logprob / self.power(length))

    def power(self, length: int) -> float:
        """What the cumulative log-probability of a hypothesis of so many tokens is divided by."""
        return float(max(length, 1) ** self.params.length_penalty)

    @property
    def early(self) -> int:
        """How the search may end before its beams do: 1 at once, 2 by the best beam's score at its longest, else 0."""
        if self.params.early_stopping == "never":
            return 2 if self.params.length_penalty > 0 else 0
        return int(self.params.early_stopping)

    def shown_score(self, answer: Answer) -> float:
        """What the answers are finally ordered by: here vLLM 0.5.4 counts the end token too."""
        return self.score(answer, self.prompt_len + len(answer.token_ids))

    def advance(self, live: list[Answer], candidates: list[BeamCandidates]) -> list[Survivor]:
        """Take one step from the live beams; an empty result ends the search.

        Args:
            live: the answers of the live beams.
            candidates: for each, the tokens that may follow.
        """
        running: list[Survivor] = []
        for parent, token in self._best_children(live, candidates):
            child = live[parent].fork()
            if child.append(token):
                self.finished.append(child)
            else:
                running.append(Survivor(parent, token.token_id, child))
        self.finished.sort(key=self.score, reverse=True)
        del self.finished[self.width :]
        running.sort(key=lambda survivor: self.score(survivor.answer), reverse=True)
        if not running or self._may_stop(running[0].answer):
            return []
        return running[: self.width]

    def best(self, live: list[Answer]) -> list[Answer]:
        """The `n` answers to show: finished ones, and while the search goes on live ones too."""
        ranked = sorted([*self.finished, *live], key=self.shown_score, reverse=True)
        return ranked[: self.params.n]

    def _best_children(
        self, live: list[Answer], candidates: list[BeamCandidates]
    ) -> list[tuple[int, ChosenToken]]:
        children = [
            (answer.cumulative_logprob + token.logprob, parent, token)
            for parent, (answer, found) in enumerate(zip(live, candidates, strict=True))
            for token in found.tokens
        ]
        children.sort(key=lambda child: child[0], reverse=True)
        return [(parent, token) for _, parent, token in children[: 2 * self.width]]

    def _may_stop(self, best_running: Answer) -> bool:
        if len(self.finished) < self.width:
            return False
        if self.early == 1:
            return True
        worst = self.score(self.finished[-1])
        return worst >= self.score(best_running, length=self.longest if self.early == 2 else None)
