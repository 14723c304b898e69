from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from huoyan.errors import InputError
from huoyan.media.types import MediaItem
from huoyan.prompt.processor import PromptProcessor

from .checkpoint import image, video
from .test_processor_text import IMAGE, VIDEO, assert_runs, grids
from .texts import innocent

safe = innocent.filter(lambda text: "�" not in text)


@given(parts=st.lists(safe | st.sampled_from(["I", "V", "<|im_end|>"]), max_size=6), data=st.data())
@settings(max_examples=200, deadline=None)
def test_ids_of_a_prompt_give_what_the_prompt_gives(
    processor: PromptProcessor, parts: list[str], data: st.DataObject
) -> None:
    prompt = "x".join({"I": IMAGE, "V": VIDEO}.get(part, part) for part in parts) + "."
    items: list[MediaItem] = [image(data.draw(grids)) for part in parts if part == "I"]
    items += [video(None, data.draw(grids)) for part in parts if part == "V"]
    assume((prompt.count(IMAGE), prompt.count(VIDEO)) == (parts.count("I"), parts.count("V")))
    tokenizer = processor.tokenizer
    ids = tokenizer.encode_with_specials(prompt)
    encoded = processor.from_token_ids(ids, items)
    expected = processor.from_text(prompt, items)
    assert_runs(processor, encoded, items)
    assert tokenizer.decode(encoded.token_ids, False) == tokenizer.decode(expected.token_ids, False)
    assert len(encoded.token_ids) == len(expected.token_ids)
    assert encoded.text is None
    # Written out in full, the ids are taken as they are.
    again = processor.from_token_ids(expected.token_ids, sorted_by_place(expected, items))
    assert again.token_ids == expected.token_ids
    assert sorted(slot.offsets for slot in again.slots) == sorted(slot.offsets for slot in expected.slots)


def sorted_by_place(encoded: Any, items: list[MediaItem]) -> list[MediaItem]:
    first = 0
    places = []
    for item in items:
        places.append((encoded.slots[first].offsets[0], item))
        first += len(item.pictures)
    return [item for _, item in sorted(places, key=lambda place: place[0])]


@pytest.mark.parametrize(
    "prompt",
    [
        f"<|im_start|>user\n{IMAGE}\nwhat<|im_end|>",
        f"{IMAGE}{IMAGE}",
        f"a ({IMAGE}) ({IMAGE}\n\n)",
        f"!{IMAGE}!{IMAGE}",
        f"<|im_end|>{IMAGE}<|im_end|>{IMAGE}<|im_end|>",
        f"  {IMAGE}  \n{IMAGE}'s",
    ],
)
def test_brackets_merged_with_their_neighbours(processor: PromptProcessor, prompt: str) -> None:
    items = [image((1, 2)) for _ in range(prompt.count(IMAGE))]
    ids = processor.tokenizer.encode_with_specials(prompt)
    encoded = processor.from_token_ids(ids, items)
    assert_runs(processor, encoded, items)
    text = processor.tokenizer.decode(encoded.token_ids, False)
    assert text == processor.tokenizer.decode(processor.from_text(prompt, items).token_ids, False)


def test_the_test_tokenizer_does_merge_brackets(processor: PromptProcessor) -> None:
    tokenizer = processor.tokenizer
    bracket = tokenizer.encode_plain(")")
    assert tokenizer.encode_plain(")\n")[: len(bracket)] != bracket
    video_ids = tokenizer.encode_plain(VIDEO)
    around = tokenizer.encode_plain(f"{VIDEO}\n")
    assert not any(around[i : i + len(video_ids)] == video_ids for i in range(len(around)))


def test_text_stays_as_it_is(processor: PromptProcessor) -> None:
    tokenizer = processor.tokenizer
    letters = [tokenizer.encode_plain(c)[0] for c in "the picture"]
    assert processor.from_token_ids(letters).token_ids == letters
    odd = [*letters, tokenizer.special_tokens["<image>"], 3, 5000]
    assert processor.from_token_ids(tuple(odd)).token_ids == odd
    placeholder = tokenizer.encode_with_specials(f"<|im_end|>{IMAGE}<|im_end|>")
    encoded = processor.from_token_ids([*letters, *placeholder, *letters], [image()])
    assert encoded.token_ids[: len(letters)] == encoded.token_ids[-len(letters) :] == letters


def test_numpy_ids(processor: PromptProcessor) -> None:
    np = pytest.importorskip("numpy")
    encoded = processor.from_token_ids(np.array([5, 6, 7]))
    assert encoded.token_ids == [5, 6, 7]
    assert all(type(i) is int for i in encoded.token_ids)


def test_errors(processor: PromptProcessor) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer.encode_with_specials(f"{IMAGE}\nhi")
    written = processor.from_text(f"{IMAGE}{IMAGE}", [image((1, 2)), image()]).token_ids
    cases: list[tuple[Any, list[MediaItem], str]] = [
        (ids, [], "1 image placeholder .* 0 images"),
        (ids, [image(), image()], "1 image placeholder .* 2 images"),
        ([1, 2], [image()], "0 image placeholders .* 1 image was"),
        ([1, 2], [video(None)], "0 video placeholders .* 1 video was"),
        ([], [], "empty"),
        ([-1], [], "negative"),
        (["a"], [], "integers"),
        ([[1, 2]], [], "integers"),
        (3, [], "integers"),
        (written, [image((1, 2))], "more pictures than the 1"),
        (written, [image((1, 2)), image(), image()], "hold 2 pictures, but 3"),
        (written, [image((2, 1)), image()], "do not spell picture 0"),
        (written, [], "more pictures than the 0"),
    ]
    for token_ids, items, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            processor.from_token_ids(token_ids, items)
        assert "\n" not in str(caught.value)
