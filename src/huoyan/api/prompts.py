"""The prompts people pass in, told apart once: text or token ids with media, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huoyan.errors import InputError, UnsupportedError

_KEYS = {"prompt", "prompt_token_ids", "multi_modal_data", "mm_processor_kwargs", "multi_modal_uuids", "type"}


@dataclass(frozen=True)
class CompletionPrompt:
    """A prompt with its chat markup: `text`, or `token_ids`, and the media of its placeholders."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    multi_modal_data: Mapping[str, Any] = field(default_factory=dict)
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation in OpenAI's form, to be rendered by the checkpoint's template."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)


Prompt = CompletionPrompt | ChatPrompt


def is_single_prompt(prompts: Any) -> bool:
    """Whether `prompts` is one prompt (text, token ids, a dict) and not a sequence of them."""
    if isinstance(prompts, (str, Mapping)):
        return True
    return _is_token_ids(prompts)


def parse_prompt(prompt: Any) -> CompletionPrompt:
    """Tell what one prompt of `generate` is.

    Raises:
        InputError: it is none of the accepted kinds, or has unknown keys.
    """
    if isinstance(prompt, CompletionPrompt):
        return prompt
    if isinstance(prompt, str):
        return CompletionPrompt(text=prompt)
    if _is_token_ids(prompt):
        return CompletionPrompt(token_ids=_token_ids(prompt))
    if not isinstance(prompt, Mapping):
        raise InputError(
            f"a prompt is text, token ids or a dict with 'prompt' and 'multi_modal_data', "
            f"not {type(prompt).__name__}"
        )
    if "encoder_prompt" in prompt or "prompt_embeds" in prompt:
        raise UnsupportedError("encoder prompts and prompt embeddings are not supported: give 'prompt'")
    unknown = sorted(set(map(str, prompt)) - _KEYS)
    if unknown:
        raise InputError(f"a prompt has no key {unknown[0]!r}: use {', '.join(sorted(_KEYS - {'type'}))}")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and ids is None:
        raise InputError("a prompt needs 'prompt' (text) or 'prompt_token_ids'")
    if text is not None and not isinstance(text, str):
        raise InputError(f"'prompt' must be text, not {type(text).__name__}")
    media = _mapping(prompt, "multi_modal_data")
    for kind in media:
        if kind not in ("image", "video"):
            raise InputError(f"multi_modal_data has 'image' and 'video', not {kind!r}")
    return CompletionPrompt(
        text=text if ids is None else None,
        token_ids=None if ids is None else _token_ids(ids),
        multi_modal_data=media,
        mm_processor_kwargs=_mapping(prompt, "mm_processor_kwargs"),
    )


def is_single_conversation(messages: Any) -> bool:
    """Whether `messages` is one conversation (a sequence of dicts) and not a sequence of conversations."""
    if isinstance(messages, Mapping):
        raise InputError("messages must be a list of messages: put the dict in a list")
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise InputError(f"messages must be a list of {{role, content}} dicts, not {type(messages).__name__}")
    if not messages:
        raise InputError("messages is empty: give at least one user message")
    return isinstance(messages[0], Mapping)


def _mapping(prompt: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = prompt.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"'{key}' must be a dict, not {type(value).__name__}")
    return value


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, (str, bytes, Mapping)):
        return False
    if hasattr(value, "ndim") and hasattr(value, "tolist"):
        return bool(value.ndim == 1 and value.size > 0 and "int" in str(value.dtype))
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], int)


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = value.tolist() if hasattr(value, "tolist") else list(value)
    if not ids:
        raise InputError("'prompt_token_ids' is empty")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise InputError(f"token ids are whole numbers from 0, not {token!r}")
    return tuple(ids)
