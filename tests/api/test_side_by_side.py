"""Pictures of one request are opened side by side, and it makes no other difference."""

from __future__ import annotations

import io
import random
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from huoyan.api.media_items import MediaChoices, MediaReader
from huoyan.api.side_by_side import open_each
from huoyan.errors import MediaError
from huoyan.media.fetch import DEFAULT_POLICY
from huoyan.media.limits import DEFAULT_LIMITS

READER = MediaReader(DEFAULT_POLICY, DEFAULT_LIMITS)


def jpeg(rng: random.Random) -> bytes:
    pixels = np.frombuffer(rng.randbytes(24 * 18 * 3), np.uint8).reshape(18, 24, 3)
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, "JPEG")
    return into.getvalue()


def test_they_are_open_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    meet = threading.Barrier(2, timeout=20)

    def load(source: str) -> str:
        meet.wait()
        return source.upper()

    assert open_each(["a", "b"], load) == ["A", "B"]


def test_an_object_is_opened_once_and_files_in_their_order() -> None:
    opened: list[Any] = []
    lock = threading.Lock()

    def load(source: Any) -> Any:
        with lock:
            opened.append(source)
        return source.read() if hasattr(source, "read") else source

    file, picture = io.BytesIO(b"ab"), Image.new("RGB", (2, 2))
    other = io.BytesIO(b"cd")
    assert open_each([file, picture, other, picture, file], load) == [b"ab", picture, b"cd", picture, b"ab"]
    assert len(opened) == 3
    assert [source for source in opened if source is not picture] == [file, other]


def test_the_first_that_fails_is_told(seed: int) -> None:
    rng = random.Random(seed)
    sources = [jpeg(rng), b"no picture", jpeg(rng), b"nor this"]
    with pytest.raises(MediaError, match="bytes") as told:
        READER.items({"image": sources}, MediaChoices())
    with pytest.raises(MediaError) as alone:
        READER.items({"image": sources[1]}, MediaChoices())
    assert str(told.value) == str(alone.value)


def test_items_are_those_of_one_after_the_other(seed: int) -> None:
    rng = random.Random(seed)
    sources = [jpeg(rng) for _ in range(9)]
    found = READER.load_each([("image", source) for source in sources], MediaChoices())
    for source, item in zip(sources, found, strict=True):
        want = np.asarray(Image.open(io.BytesIO(source)).convert("RGB"))
        assert np.array_equal(item.pictures[0].pixels, want)
