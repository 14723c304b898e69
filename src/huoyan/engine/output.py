"""From chosen tokens to `RequestOutput`s."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Protocol

from huoyan.api.outputs import CompletionOutput, RequestOutput

if TYPE_CHECKING:
    from huoyan.api.outputs import RequestMetrics, TokenLogprobs
    from huoyan.api.sampling_params import SamplingParams
    from huoyan.engine.answer import Answer
    from huoyan.engine.beam import BeamSearch
    from huoyan.engine.request import EngineRequest


class Answered(Protocol):
    """A request with what was said so far: the engine's `Group`, or what another backend keeps."""

    request: EngineRequest
    params: SamplingParams
    width: int
    answers: list[Answer]
    beams: BeamSearch | None
    metrics: RequestMetrics
    warnings: list[str]
    prompt_logprobs: list[TokenLogprobs | None] | None

    @property
    def live_answers(self) -> list[Answer]: ...

    @property
    def finished(self) -> bool: ...


def shown_answers(group: Answered) -> list[Answer]:
    """The `n` answers a person sees, in their order: of more samples than asked for, the likeliest first."""
    if group.beams is not None:
        return group.beams.best(group.live_answers)
    if group.width > group.params.n:
        ranked = sorted(group.answers, key=lambda answer: -answer.cumulative_logprob)
        return ranked[: group.params.n]
    return group.answers


def request_output(group: Answered, answers: list[Answer], error: str | None = None) -> RequestOutput:
    """The state of a request; `answers` in the order they are shown."""
    request = group.request
    finished = group.finished
    if finished and group.metrics.finished_time is None:
        group.metrics.finished_time = monotonic()
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt.text,
        prompt_token_ids=request.prompt.token_ids,
        outputs=[] if error is not None else [_completion(i, a, group) for i, a in enumerate(answers)],
        finished=finished,
        prompt_logprobs=group.prompt_logprobs,
        metrics=group.metrics,
        error=error,
        warnings=group.warnings,
    )


def _completion(index: int, answer: Answer, group: Answered) -> CompletionOutput:
    wants_logprobs = group.params.logprobs is not None
    return CompletionOutput(
        index=index,
        text=answer.text,
        # Copied: a reader in another thread must not see tokens without their text.
        token_ids=answer.token_ids.copy(),
        cumulative_logprob=answer.cumulative_logprob,
        logprobs=answer.logprobs.copy() if wants_logprobs else None,
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
    )
