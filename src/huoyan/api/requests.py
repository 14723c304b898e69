"""From the arguments of `generate` and `chat` to a list of jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huoyan.api.driver import Job
from huoyan.api.prompts import (
    ChatPrompt,
    CompletionPrompt,
    is_single_conversation,
    is_single_prompt,
    parse_prompt,
)
from huoyan.api.sampling_params import SamplingParams
from huoyan.errors import HuoyanError, InputError

Params = SamplingParams | Sequence[SamplingParams]


def list_prompts(prompts: Any, prompt_token_ids: Any) -> tuple[list[Any], bool]:
    """The prompts of `generate` and whether there was only one, given by itself.

    `prompt_token_ids` is the keyword of vLLM 0.5: token ids beside, or instead of, the texts.
    """
    if prompt_token_ids is not None:
        if prompts is not None:
            raise InputError("give prompts or prompt_token_ids, not both")
        if is_single_prompt(prompt_token_ids):
            return [{"prompt_token_ids": prompt_token_ids}], True
        return [{"prompt_token_ids": ids} for ids in prompt_token_ids], False
    if prompts is None:
        raise InputError("generate needs prompts: text, token ids, a dict, or a list of these")
    if is_single_prompt(prompts):
        return [prompts], True
    if not isinstance(prompts, Sequence):
        try:
            prompts = list(prompts)
        except TypeError:
            raise InputError(
                f"prompts must be text, token ids, a dict, or a list of these, not {type(prompts).__name__}"
            ) from None
    return list(prompts), False


def list_params(params: Params | None, count: int, default: SamplingParams) -> list[SamplingParams]:
    """One `SamplingParams` a prompt."""
    if params is None:
        return [default] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, Mapping) or not isinstance(params, Sequence):
        raise InputError(
            f"sampling_params must be SamplingParams or a list of them, not {type(params).__name__}"
        )
    if len(params) != count:
        raise InputError(
            f"there are {count} prompts and {len(params)} sampling_params: give one for each, or one"
        )
    for item in params:
        if not isinstance(item, SamplingParams):
            raise InputError(f"sampling_params must be SamplingParams, not {type(item).__name__}")
    return list(params)


def completion_jobs(
    ids: Sequence[str], prompts: Sequence[Any], params: Sequence[SamplingParams]
) -> list[Job]:
    """A job a prompt; one that cannot be read keeps its place as an error."""
    jobs: list[Job] = []
    for request_id, prompt, one in zip(ids, prompts, params, strict=True):
        try:
            parsed: CompletionPrompt | None = parse_prompt(prompt)
            error: HuoyanError | None = None
        except HuoyanError as found:
            parsed, error = None, found
        jobs.append(Job(request_id, parsed, one, error))
    return jobs


def list_conversations(messages: Any) -> tuple[list[Any], bool]:
    """The conversations of `chat` and whether there was only one, given by itself."""
    if is_single_conversation(messages):
        return [messages], True
    for conversation in messages:
        if not isinstance(conversation, Sequence) or isinstance(conversation, (str, bytes)):
            raise InputError("messages must be a list of messages or a list of such lists")
    return list(messages), False


def chat_jobs(
    ids: Sequence[str],
    conversations: Sequence[Any],
    params: Sequence[SamplingParams],
    options: Mapping[str, Any],
) -> list[Job]:
    """A job a conversation."""
    return [
        Job(request_id, ChatPrompt(messages=conversation, **options), one)
        for request_id, conversation, one in zip(ids, conversations, params, strict=True)
    ]
