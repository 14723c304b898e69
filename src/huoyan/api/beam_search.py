"""`LLM.beam_search` for those who come from today's vLLM, where it replaced `use_beam_search`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huoyan.errors import InputError

if TYPE_CHECKING:
    from huoyan.api.outputs import CompletionOutput, RequestOutput, TokenLogprobs
    from huoyan.api.sampling_params import SamplingParams


@dataclass
class BeamSearchParams:
    """vLLM's parameters of the same name. It maps onto `SamplingParams(use_beam_search=True, …)`."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def to_sampling_params(self) -> SamplingParams:
        """The request that runs this search: width `beam_width`, all of its beams returned."""
        from huoyan.api.sampling_params import SamplingParams

        if isinstance(self.beam_width, bool) or not isinstance(self.beam_width, int) or self.beam_width < 1:
            raise InputError(f"beam_width must be a whole number of at least 1 (got {self.beam_width!r})")
        if self.temperature != 0:
            raise InputError("beam search keeps the likeliest beams: temperature must be 0")
        common: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "temperature": 0.0,
            "logprobs": 1,
        }
        if self.beam_width == 1:
            return SamplingParams(**common)
        return SamplingParams(
            n=self.beam_width,
            best_of=self.beam_width,
            use_beam_search=True,
            length_penalty=self.length_penalty,
            **common,
        )


@dataclass
class BeamSearchSequence:
    """One beam. As in vLLM, `tokens` and `text` hold prompt and answer; `answer` is the answer alone."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    cum_logprob: float
    text: str
    answer: str
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]
    error: str | None = None


def to_beam_search_output(output: RequestOutput, tokenizer: Any) -> BeamSearchOutput:
    """Give a request's answers in the shape of vLLM's `beam_search`."""
    prompt = tokenizer.decode(output.prompt_token_ids) if output.prompt is None else output.prompt
    return BeamSearchOutput(
        [_sequence(answer, output.prompt_token_ids, prompt) for answer in output.outputs], output.error
    )


def _sequence(answer: CompletionOutput, prompt_ids: list[int], prompt: str) -> BeamSearchSequence:
    return BeamSearchSequence(
        tokens=[*prompt_ids, *answer.token_ids],
        logprobs=answer.logprobs or [],
        cum_logprob=answer.cumulative_logprob or 0.0,
        text=prompt + answer.text,
        answer=answer.text,
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
    )
