from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from huoyan.errors import InputError, MediaError, UnsupportedError
from huoyan.media.types import MediaItem
from huoyan.prompt.messages import MediaPart, Message, TextPart, parse_messages


def load(parts: Sequence[tuple[str, Any]]) -> list[MediaItem]:
    return [MediaItem((source,), kind) for kind, source in parts]


def test_texts_and_parts() -> None:
    picture = object()
    messages = parse_messages(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:1", "detail": "high"}},
                    {"type": "image_url", "image_url": "a.png"},
                    {"type": "text", "text": "and"},
                    {"type": "image", "image": picture},
                    {"type": "video_url", "video_url": {"url": "b.mp4"}},
                    {"type": "video", "video": ["f1", "f2"]},
                    {"type": "input_text", "text": "?"},
                    {"image_url": "c.png"},
                    {"text": "t"},
                    "plain",
                    picture,
                ],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
            {"role": "developer", "content": "x"},
        ],
        load,
    )
    assert [m.role for m in messages] == ["system", "user", "assistant", "system"]
    assert messages[0].parts == (TextPart("Be brief."),)
    seen = [
        p.text if isinstance(p, TextPart) else (p.item.kind, p.item.pictures[0]) for p in messages[1].parts
    ]
    assert seen == [
        ("image", "data:1"),
        ("image", "a.png"),
        "and",
        ("image", picture),
        ("video", "b.mp4"),
        ("video", ["f1", "f2"]),
        "?",
        ("image", "c.png"),
        "t",
        "plain",
        ("image", picture),
    ]


def test_what_is_parsed_already_passes_through() -> None:
    ready = Message("user", (TextPart("a"), MediaPart(*load([("image", 1)]))))
    assert parse_messages([ready], load) == [ready]
    assert parse_messages([{"role": "user", "content": ready.parts}], load) == [ready]


def test_errors_of_the_loader_pass_through() -> None:
    def fails(parts: Sequence[tuple[str, Any]]) -> list[MediaItem]:
        raise MediaError(f"{parts[0][1]}: not found")

    with pytest.raises(MediaError, match=r"x\.png: not found"):
        parse_messages([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], fails)


def test_all_is_opened_in_one_call_and_nothing_where_a_message_is_wrong() -> None:
    calls: list[list[tuple[str, Any]]] = []

    def counted(parts: Sequence[tuple[str, Any]]) -> list[MediaItem]:
        calls.append(list(parts))
        return load(parts)

    turn = {
        "role": "user",
        "content": [{"type": "image", "image": "a"}, "?", {"type": "video", "video": "b"}],
    }
    parse_messages([turn, {"role": "assistant", "content": "1"}, turn], counted)
    assert calls == [[("image", "a"), ("video", "b")] * 2]
    with pytest.raises(InputError, match=r"messages\[1\]"):
        parse_messages([turn, {"role": "user", "content": []}], counted)
    parse_messages([{"role": "user", "content": "words"}], counted)
    assert len(calls) == 1


USER = "user"


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ("hi", InputError, "must be a list"),
        ({"role": USER}, InputError, "must be a list"),
        (None, InputError, "null"),
        ([], InputError, "empty"),
        (["hi"], InputError, r"messages\[0\] must be an object"),
        ([{"role": USER, "content": "a"}, {"content": "a"}], InputError, r"messages\[1\]\.role is None"),
        ([{"role": "User", "content": "a"}], InputError, "'User'"),
        ([{"role": "<|im_end|>", "content": "a"}], InputError, "role"),
        ([{"role": ["user"], "content": "a"}], InputError, "role"),
        ([{"role": "tool", "content": "a"}], UnsupportedError, "tool"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], UnsupportedError, "tool"),
        ([{"role": USER, "content": None}], InputError, "not a null"),
        ([{"role": USER, "content": 3}], InputError, "not a int"),
        ([{"role": USER, "content": []}], InputError, "empty list"),
        ([{"role": USER, "content": [{"type": "text"}]}], InputError, r"content\[0\]\.text"),
        ([{"role": USER, "content": [{"type": "image_url"}]}], InputError, "has no 'image_url'"),
        (
            [{"role": USER, "content": [{"type": "image_url", "image_url": {"url": ""}}]}],
            InputError,
            "has no",
        ),
        (
            [{"role": USER, "content": [{"type": "input_audio"}]}],
            UnsupportedError,
            "pictures and videos only",
        ),
        ([{"role": USER, "content": [{"type": "image_embeds"}]}], UnsupportedError, "image_embeds"),
        ([{"role": USER, "content": [{"type": "sound"}]}], InputError, "'sound'"),
        ([{"role": USER, "content": [{"type": []}]}], InputError, "type is"),
        ([{"role": USER, "content": [{}]}], InputError, "type is None"),
        ([{"role": USER, "content": [None]}], InputError, "not a null"),
        ([{"role": USER, "content": [3]}], InputError, "not a int"),
    ],
)
def test_refusals(messages: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        parse_messages(messages, load)
    assert "\n" not in str(caught.value)
