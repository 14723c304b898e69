"""A conversation as its stages see it, read from OpenAI-style messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from huoyan.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from huoyan.media.types import MediaItem

Role = Literal["system", "user", "assistant"]
MediaKind = Literal["image", "video"]
LoadEach = Callable[[Sequence[tuple[MediaKind, Any]]], Sequence["MediaItem"]]
"""Opens what parts point at (paths, URLs, picture objects, frames), all of a conversation's in one call."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_TEXT_TYPES = ("text", "input_text", "output_text")
_MEDIA_TYPES: dict[str, tuple[MediaKind, str]] = {
    "image": ("image", "image"),
    "image_url": ("image", "image_url"),
    "input_image": ("image", "image_url"),
    "image_pil": ("image", "image_pil"),
    "video": ("video", "video"),
    "video_url": ("video", "video_url"),
}


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class MediaPart:
    item: MediaItem


Part = TextPart | MediaPart


@dataclass(frozen=True)
class Message:
    """One turn. Its parts stand each on lines of their own."""

    role: Role
    parts: tuple[Part, ...]


def parse_messages(messages: Any, load_each: LoadEach) -> list[Message]:
    """Read `[{"role": …, "content": text or parts}, …]`.

    A part is a text, `{"type": "text", "text": …}`, `{"type": "image_url", "image_url": {"url": …}}` (or
    `video_url`), `{"type": "image", "image": anything load_each takes}` (or `video`), or an object for
    `load_each` itself. Nothing is opened before all messages are read; whatever `load_each` raises passes through.
    Raises InputError (one line that names the message), UnsupportedError for parts this model has no use for.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(f"messages must be a list of {{'role', 'content'}} objects, not a {_kind(messages)}")
    if not messages:
        raise InputError("messages is empty: at least one message is needed")
    wanted: list[tuple[MediaKind, Any]] = []
    read = [_message(message, f"messages[{i}]", wanted) for i, message in enumerate(messages)]
    items = load_each(wanted) if wanted else ()
    return [Message(role, tuple(_filled(part, items) for part in parts)) for role, parts in read]


@dataclass(frozen=True)
class _Wanted:
    """Stands for an item that is still to be opened."""

    index: int


def _filled(part: Part | _Wanted, items: Sequence[MediaItem]) -> Part:
    return MediaPart(items[part.index]) if isinstance(part, _Wanted) else part


def _want(wanted: list[tuple[MediaKind, Any]], kind: MediaKind, source: Any) -> _Wanted:
    wanted.append((kind, source))
    return _Wanted(len(wanted) - 1)


def _message(
    message: Any, where: str, wanted: list[tuple[MediaKind, Any]]
) -> tuple[Role, tuple[Part | _Wanted, ...]]:
    if isinstance(message, Message):
        return message.role, message.parts
    if not isinstance(message, Mapping):
        raise InputError(f"{where} must be an object with 'role' and 'content', not a {_kind(message)}")
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls"):
        raise UnsupportedError(f"{where} is about tool calls, which this model does not make; leave it out")
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{where}.role is {role!r}: use 'system', 'user' or 'assistant'")
    content = message.get("content")
    if isinstance(content, str):
        return _ROLES[role], (TextPart(content),)
    if content is None or isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise InputError(f"{where}.content must be a text or a list of parts, not a {_kind(content)}")
    if not content:
        raise InputError(f"{where}.content is an empty list: give it a text or a picture")
    parts = (_part(part, f"{where}.content[{i}]", wanted) for i, part in enumerate(content))
    return _ROLES[role], tuple(parts)


def _part(part: Any, where: str, wanted: list[tuple[MediaKind, Any]]) -> Part | _Wanted:
    if isinstance(part, (TextPart, MediaPart)):
        return part
    if isinstance(part, str):
        return TextPart(part)
    if part is None or isinstance(part, (bool, int, float)):
        raise InputError(f"{where} must be a part such as {{'type': 'text', 'text': …}}, not a {_kind(part)}")
    if not isinstance(part, Mapping):
        return _want(wanted, "image", part)
    kind = part.get("type")
    if kind is None:
        # vLLM also takes parts without a type: {"image_url": …}, {"text": …}.
        kind = next((key for key in ("text", *_MEDIA_TYPES) if key in part), None)
    if kind in _TEXT_TYPES:
        text = part.get("text")
        if not isinstance(text, str):
            raise InputError(f"{where}.text must be a text, not a {_kind(text)}")
        return TextPart(text)
    if isinstance(kind, str) and kind in _MEDIA_TYPES:
        media, key = _MEDIA_TYPES[kind]
        source = part.get(key)
        if isinstance(source, Mapping) and "url" in source:
            source = source["url"]
        if source is None or (isinstance(source, str) and not source):
            raise InputError(
                f"{where} is of type {kind!r} but has no {key!r}: name a file, a URL or a data: URL"
            )
        return _want(wanted, media, source)
    if isinstance(kind, str) and ("audio" in kind or "embeds" in kind or kind in ("file", "input_file")):
        raise UnsupportedError(
            f"{where} is of type {kind!r}: this model takes text, pictures and videos only"
        )
    raise InputError(f"{where}.type is {kind!r}: use 'text', 'image_url', 'image', 'video_url' or 'video'")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
