"""Beams whose parameters change the logits: bias, `min_tokens`, penalties, grammars.

vLLM reports log-probabilities before all of these, and a search ranks by those after them. So it is asked for the
whole vocabulary, and the native engine's own steps are applied. What these steps add does not depend on a shift of
all logits, hence log-probabilities do as well; only `repetition_penalty`, which multiplies, needs the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huoyan.engine.sampler import BeamCandidates, SamplingRow, beam_candidates
from huoyan.engine.token_counts import TokenCounts

if TYPE_CHECKING:
    from huoyan.api.sampling_params import SamplingParams
    from huoyan.engine.answer import Answer
    from huoyan.engine.structured import GrammarState


def changes_logits(params: SamplingParams) -> bool:
    """Whether a search by these parameters needs the whole vocabulary."""
    return bool(
        params.logit_bias
        or params.min_tokens
        or params.has_penalties
        or params.structured_outputs is not None
    )


class WholeVocabulary:
    """Candidates of one request's beams."""

    def __init__(
        self, params: SamplingParams, prompt_ids: list[int], vocab_size: int, grammar: GrammarState | None
    ) -> None:
        """`grammar`: at its start, where the request has one."""
        self._params = params
        self._prompt_ids = prompt_ids
        self._vocab_size = vocab_size
        self._grammar = grammar

    def candidates(self, answer: Answer, reported: Any) -> BeamCandidates:
        """What may follow `answer`, of which vLLM reported one position with every token."""
        import torch

        logits = torch.full((1, self._vocab_size), float("-inf"))
        logits[0, torch.tensor(reported.token_ids)] = torch.tensor(reported.logprobs)
        counts = allowed = None
        if self._params.has_penalties:
            counts = TokenCounts(self._prompt_ids)
            counts.update(answer.token_ids)
        if self._grammar is not None:
            grammar = self._grammar.fork()
            grammar.update(answer.token_ids)
            allowed = grammar.allowed(logits.device)
        row = SamplingRow(
            self._params,
            len(answer.token_ids),
            stop_token_ids=answer.rules.held_back,
            counts=counts,
            allowed=allowed,
        )
        return beam_candidates(logits, [row])[0]
