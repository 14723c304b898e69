"""One answer as it grows: its text, its log-probabilities, and whether it is at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huoyan.api.outputs import FinishReason, TokenLogprobs
    from huoyan.api.sampling_params import SamplingParams
    from huoyan.prompt.detokenizer import IncrementalDetokenizer
    from huoyan.prompt.stop_strings import StopStringMatcher
    from huoyan.prompt.tokenizer import Tokenizer


@dataclass(frozen=True)
class StopRules:
    """What ends the answers of one request, other than their length."""

    eos_token_id: int | None
    """Ends an answer without being named as its `stop_reason`."""
    token_ids: frozenset[int]
    """These end it and are named."""
    min_tokens: int
    show_stop: bool
    """Whether what ended the answer stays in its text."""
    held_back: frozenset[int] = frozenset()
    """None of these may be chosen before `min_tokens`: also the checkpoint's, where the request ignores them."""

    @staticmethod
    def of(params: SamplingParams, eos_token_id: int | None, stop_token_ids: Sequence[int]) -> StopRules:
        """The request's rules, and the checkpoint's where the request does not ignore them."""
        own = frozenset(params.stop_token_ids or ())
        show = params.include_stop_str_in_output
        held_back = params.all_stop_token_ids(eos_token_id, stop_token_ids)
        if params.ignore_eos:
            return StopRules(None, own, params.min_tokens, show, held_back)
        named = (own | frozenset(stop_token_ids)) - {eos_token_id}
        return StopRules(eos_token_id, named, params.min_tokens, show, held_back)


class ChosenToken(NamedTuple):
    """A token that follows a sequence. A tuple, because each step makes one for each sequence."""

    token_id: int
    logprob: float = 0.0
    logprobs: TokenLogprobs | None = None
    """The likeliest tokens and the chosen one, where the request asks for them."""


class AnswerText:
    """The text of one answer, token by token; stop strings end it."""

    def __init__(self, detokenizer: IncrementalDetokenizer, matcher: StopStringMatcher) -> None:
        self.text = ""
        self.stop: str | None = None
        """The stop string that was met."""
        self._detokenizer = detokenizer
        self._matcher = matcher

    @staticmethod
    def of(params: SamplingParams, tokenizer: Tokenizer) -> AnswerText:
        from huoyan.prompt.detokenizer import IncrementalDetokenizer
        from huoyan.prompt.stop_strings import StopStringMatcher

        stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ())
        return AnswerText(
            IncrementalDetokenizer(
                tokenizer, params.skip_special_tokens, params.spaces_between_special_tokens
            ),
            StopStringMatcher(stop, params.include_stop_str_in_output),
        )

    def push(self, token_id: int, may_stop: bool) -> None:
        self._take(self._detokenizer.push(token_id), may_stop)

    def final(self, may_stop: bool) -> None:
        """No more tokens come: show what was held back."""
        self._take(self._detokenizer.final(), may_stop)
        if self.stop is None:
            self.text += self._matcher.final()

    def copy(self) -> AnswerText:
        twin = AnswerText(self._detokenizer.copy(), self._matcher.copy())
        twin.text = self.text
        return twin

    def _take(self, text: str, may_stop: bool) -> None:
        result = self._matcher.push(text, may_stop)
        self.text += result.text
        self.stop = result.stop


class Answer:
    """What one sequence has said. `finish_reason` is None until it ends."""

    __slots__ = (
        "cumulative_logprob",
        "finish_reason",
        "logprobs",
        "max_tokens",
        "rules",
        "stop_reason",
        "token_ids",
        "words",
    )

    def __init__(self, rules: StopRules, words: AnswerText | None, max_tokens: int) -> None:
        self.rules = rules
        self.words = words
        self.max_tokens = max_tokens
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return self.words.text if self.words else ""

    def append(self, token: ChosenToken) -> bool:
        """Take a token; True where it ends the answer."""
        token_id, logprob, logprobs = token
        token_ids, rules, words = self.token_ids, self.rules, self.words
        token_ids.append(token_id)
        self.cumulative_logprob += logprob
        if logprobs is not None:
            self.logprobs.append(logprobs)
        may_stop = len(token_ids) >= rules.min_tokens
        is_eos = token_id == rules.eos_token_id
        stops = may_stop and (is_eos or token_id in rules.token_ids)
        if words is not None and (rules.show_stop or not stops):
            words.push(token_id, may_stop)
        if stops:
            self.finish("stop", None if is_eos else token_id)
        elif words is not None and words.stop is not None:
            self.finish_reason, self.stop_reason = "stop", words.stop
        elif len(token_ids) >= self.max_tokens:
            self.finish("length")
        return self.finish_reason is not None

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End the answer. Text that was held back may still bring a stop string to light."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self.words:
            self.words.final(len(self.token_ids) >= self.rules.min_tokens)
            if reason == "length" and self.words.stop is not None:
                self.finish_reason, self.stop_reason = "stop", self.words.stop

    def fork(self) -> Answer:
        """A copy that goes its own way."""
        twin = Answer(self.rules, self.words.copy() if self.words else None, self.max_tokens)
        twin.token_ids = self.token_ids.copy()
        twin.logprobs = self.logprobs.copy()
        twin.cumulative_logprob = self.cumulative_logprob
        return twin
