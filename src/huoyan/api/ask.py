"""`ask`: one question about pictures, as a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huoyan.api.media_items import is_video, is_video_name
from huoyan.errors import InputError

if TYPE_CHECKING:
    from huoyan.api.sampling_params import SamplingParams

ASK_MAX_TOKENS = 1024


def ask_messages(pictures: Any, question: str, system: str | None = None) -> list[dict[str, Any]]:
    """The conversation: the pictures in their order, each on a line, then the question."""
    if not isinstance(question, str) or not question.strip():
        raise InputError("the question is empty: ask(pictures, question)")
    parts: list[dict[str, Any]] = [_part(item) for item in _list(pictures)]
    parts.append({"type": "text", "text": question})
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def ask_params(params: Mapping[str, Any]) -> SamplingParams:
    """Greedy with room for a description, unless `params` says otherwise."""
    from huoyan.api.openai_params import with_defaults

    return with_defaults(params, {"temperature": 0.0, "max_tokens": ASK_MAX_TOKENS})


def _list(pictures: Any) -> list[Any]:
    if pictures is None:
        return []
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


def _part(item: Any) -> dict[str, Any]:
    if is_video(item) or is_video_name(item):
        return {"type": "video", "video": item}
    return {"type": "image", "image": item}
