"""One line of the input: OpenAI's batch format, or a simple `{id, images, prompt}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huoyan.api.ask import ask_messages
from huoyan.api.openai_params import chat_options_from_body, sampling_from_body
from huoyan.api.sampling_params import SamplingParams
from huoyan.errors import HuoyanError, InputError

Style = Literal["openai", "simple"]

_URL = re.compile(r"(https?|data|file):", re.IGNORECASE)
_ENDPOINT = "/v1/chat/completions"
_OPENAI_KEYS = {"custom_id", "method", "url", "body"}
_SIMPLE_KEYS = {
    "id", "custom_id", "image", "images", "video", "videos", "prompt", "question", "messages",
    "system", "params", "max_slice_nums", "frames",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A request, or what is wrong with it. `number` counts the rows of the file from 0."""

    number: int
    id: Any
    style: Style
    messages: Sequence[Mapping[str, Any]] = ()
    params: SamplingParams | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    error: HuoyanError | None = None


class RowReader:
    """Reads rows; relative paths are relative to `folder`, missing parameters come from `defaults`."""

    def __init__(self, folder: Path, defaults: Mapping[str, Any]) -> None:
        self._folder = folder
        self._defaults = defaults

    def read(self, number: int, line: str | bytes) -> Row:
        """One line; whatever is wrong with it becomes the row's error."""
        try:
            value = json.loads(line)
        except ValueError as error:
            return Row(number, None, "simple", error=InputError(f"the line is not JSON ({error})"))
        if not isinstance(value, dict):
            return Row(number, None, "simple", error=InputError("the line is not a JSON object"))
        style: Style = "openai" if "body" in value else "simple"
        identity = row_id(value)
        try:
            if style == "openai":
                return self._openai(number, identity, value)
            return self._simple(number, identity, value)
        except HuoyanError as error:
            return Row(number, identity, style, error=error)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            return Row(number, identity, style, error=InputError(f"the row is malformed ({error})"))

    def _openai(self, number: int, identity: Any, value: dict[str, Any]) -> Row:
        _check_keys(value, _OPENAI_KEYS)
        body = value["body"]
        if not isinstance(body, Mapping):
            raise InputError("body must be an object")
        if value.get("method", "POST") != "POST" or value.get("url", _ENDPOINT) != _ENDPOINT:
            raise InputError(f"only POST {_ENDPOINT} can be run")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise InputError("body.messages must be a list of messages")
        return Row(
            number,
            identity,
            "openai",
            [self._message(message) for message in messages],
            sampling_from_body(body, self._defaults),
            chat_options_from_body(body),
        )

    def _simple(self, number: int, identity: Any, value: dict[str, Any]) -> Row:
        _check_keys(value, _SIMPLE_KEYS)
        params = value.get("params") or {}
        if not isinstance(params, Mapping):
            raise InputError("params must be an object")
        options: dict[str, Any] = {}
        choices = {"max_slice_nums": value.get("max_slice_nums"), "max_frames": value.get("frames")}
        options["mm_processor_kwargs"] = {k: v for k, v in choices.items() if v is not None}
        return Row(
            number,
            identity,
            "simple",
            self._conversation(value),
            sampling_from_body(params, self._defaults),
            options,
        )

    def _conversation(self, value: dict[str, Any]) -> Sequence[Mapping[str, Any]]:
        if "messages" in value:
            return [self._message(message) for message in value["messages"]]
        question = value.get("prompt", value.get("question"))
        if not isinstance(question, str):
            raise InputError("the row needs 'prompt' (or 'question'), a text")
        media = [{"type": "image", "image": self._path(one)} for one in _many(value, "image")]
        media += [{"type": "video", "video": self._path(one)} for one in _many(value, "video")]
        messages = ask_messages(None, question, value.get("system"))
        messages[-1]["content"] = [*media, *messages[-1]["content"]]
        return messages

    def _message(self, message: Any) -> Any:
        """The message with its media paths made absolute."""
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            return message
        return {**message, "content": [self._part(part) for part in content]}

    def _part(self, part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        made = dict(part)
        for key in ("image_url", "video_url", "image", "video"):
            source = part.get(key)
            if isinstance(source, str):
                made[key] = self._path(source)
            elif isinstance(source, Mapping) and isinstance(source.get("url"), str):
                made[key] = {**source, "url": self._path(source["url"])}
        return made

    def _path(self, source: Any) -> str:
        if not isinstance(source, str) or not source:
            raise InputError(f"a picture or video must be a path or a URL, not {source!r}")
        return source if _URL.match(source) else str(self._folder / Path(source).expanduser())


def row_id(value: Mapping[str, Any]) -> Any:
    """A row's own name, of either style."""
    return value["custom_id"] if "custom_id" in value else value.get("id")


def _many(value: Mapping[str, Any], kind: str) -> list[Any]:
    """`image` and `images` are the same: one, or a list."""
    found: list[Any] = []
    for key in (kind, f"{kind}s"):
        one = value.get(key)
        if one is not None:
            found += one if isinstance(one, list) else [one]
    return found


def _check_keys(value: Mapping[str, Any], known: set[str]) -> None:
    for key in value:
        if key not in known:
            raise InputError(f"unknown key {key!r}: a row has {', '.join(sorted(known))}")
