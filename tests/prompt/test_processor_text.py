from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from huoyan.errors import InputError
from huoyan.media.types import MediaItem
from huoyan.prompt.processor import PromptProcessor
from huoyan.prompt.types import EncodedPrompt

from .checkpoint import SPECIAL, TAGS, image, video, written
from .texts import innocent

IMAGE, VIDEO = "(<image>./</image>)", "(<video>./</video>)"
grids = st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda g: g != (1, 1)))


def assert_runs(processor: PromptProcessor, encoded: EncodedPrompt, items: list[MediaItem]) -> None:
    """Every run is 64 placeholder tokens in the right pair of tags, and nothing else is one."""
    ids = encoded.token_ids
    tag = {t: processor.tokenizer.special_tokens[t] for t in TAGS}
    pictures = [p for item in items for p in item.pictures]
    assert len(encoded.slots) == len(pictures)
    covered: set[int] = set()
    for slot, picture in zip(encoded.slots, pictures, strict=True):
        assert slot.length == 64
        assert len(slot.offsets) == picture.plan.num_slices
        for s, offset in enumerate(slot.offsets):
            assert ids[offset : offset + 64] == [tag["<unk>"]] * 64
            name = "image" if s == 0 else "slice"
            assert (ids[offset - 1], ids[offset + 64]) == (tag[f"<{name}>"], tag[f"</{name}>"])
            covered.update(range(offset, offset + 64))
        assert list(slot.offsets) == sorted(slot.offsets)
    assert {i for i, token_id in enumerate(ids) if token_id == tag["<unk>"]} == covered


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_the_expanded_text(
    processor: PromptProcessor, reference: Any, data: st.DataObject
) -> None:
    prompt, expanded, pictures, images, videos = "", "", "", [], []
    for _ in range(data.draw(st.integers(0, 6))):
        kind = data.draw(st.sampled_from(["text", "turn", "image", "plain image", "video"]))
        if kind in ("text", "turn"):
            text = data.draw(innocent) if kind == "text" else "<|im_end|>\n<|im_start|>user\n"
            prompt, expanded = prompt + text, expanded + text
            continue
        if kind == "video":
            frames = data.draw(st.lists(grids, min_size=1, max_size=3))
            videos.append(video(*frames))
            picture = "".join(map(written, frames))
        else:
            grid = data.draw(grids)
            picture = written(grid, len(images) if kind == "image" else None)
            images.append(image(grid, use_image_id=None if kind == "image" else False))
        prompt += VIDEO if kind == "video" else IMAGE
        expanded, pictures = expanded + picture, pictures + picture
    prompt, expanded = prompt + "x", expanded + "x"
    # Texts side by side may spell a tag or a placeholder, which would be a forgery: not the matter here.
    assume(all(expanded.count(tag) == pictures.count(tag) for tag in TAGS))
    assume((prompt.count(IMAGE), prompt.count(VIDEO)) == (len(images), len(videos)))
    encoded = processor.from_text(prompt, [*images, *videos])
    assert encoded.token_ids == reference(expanded).input_ids
    assert encoded.text == prompt
    assert_runs(processor, encoded, [*images, *videos])


@given(text=st.lists(st.one_of(st.sampled_from([*TAGS, "(", ")", "./"]), innocent), max_size=8).map("".join))
@settings(max_examples=200, deadline=None)
def test_tags_in_a_raw_prompt_are_text(processor: PromptProcessor, text: str) -> None:
    assume(not any(marker in text for marker in [IMAGE, VIDEO, *SPECIAL] if marker not in TAGS))
    encoded = processor.from_text(f"<|im_start|>user\n{IMAGE}\n{text}<|im_end|>", [image((2, 1))])
    assert_runs(processor, encoded, [image((2, 1))])
    tokenizer = processor.tokenizer
    begin = encoded.slots[0].offsets[-1] + 65
    assert encoded.token_ids[begin:-1] == tokenizer.encode_plain("\n" + text)
    assert encoded.token_ids[0] == tokenizer.special_tokens["<|im_start|>"]


def test_the_recipe_s_prompts(processor: PromptProcessor, reference: Any) -> None:
    one = [{"role": "user", "content": f"{IMAGE}\n请描述这张图片"}]
    prompt = reference.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
    encoded = processor.from_text(prompt, [image((3, 2))])
    assert encoded.token_ids == reference(prompt.replace(IMAGE, written((3, 2), 0))).input_ids

    frames = [image((1, 2), use_image_id=False, max_slice_nums=2) for _ in range(20)]
    many = [{"role": "user", "content": IMAGE * 20 + "\nPlease describe this video."}]
    prompt = reference.apply_chat_template(many, tokenize=False, add_generation_prompt=True)
    encoded = processor.from_text(prompt, frames)
    assert encoded.token_ids == reference(prompt.replace(IMAGE, written((1, 2)))).input_ids
    assert_runs(processor, encoded, frames)


def test_numbers_count_the_images_of_the_prompt(processor: PromptProcessor, reference: Any) -> None:
    items = [image(), video(None, None), image(use_image_id=False), *[image() for _ in range(10)]]
    prompt = IMAGE + VIDEO + IMAGE * 11
    numbers = [0, *range(2, 12)]
    expanded = written(None, 0) + written(None) * 3 + "".join(written(None, n) for n in numbers[1:])
    assert processor.from_text(prompt, items).token_ids == reference(expanded).input_ids
    numbered_video = [video(None, None, use_image_id=True)]
    assert processor.from_text(VIDEO, numbered_video).token_ids == (
        reference(written(None, 0) + written(None, 1)).input_ids
    )


def test_slots_follow_the_items_not_the_prompt(processor: PromptProcessor) -> None:
    items = [image((2, 2)), video(None, (1, 2))]
    encoded = processor.from_text(f"{VIDEO} then {IMAGE}", items)
    assert_runs(processor, encoded, items)
    assert encoded.slots[0].offsets[0] > encoded.slots[2].offsets[-1]


@pytest.mark.parametrize(
    ("prompt", "items", "words"),
    [
        (f"{IMAGE}{IMAGE}", [image()], ["2 image placeholders", "1 image was given"]),
        ("hello", [image(), image()], ["0 image placeholders", "2 images were given"]),
        (f"{IMAGE}", [], ["1 image placeholder (", "0 images were given"]),
        (f"{IMAGE}", [video(None)], ["1 image placeholder (", "0 images were given"]),
        (f"{VIDEO}", [], ["1 video placeholder (", "0 videos were given"]),
        ("", [], ["empty"]),
        (f"{VIDEO}", [MediaItem((), "video")], ["video 0", "no picture"]),
        (f"{IMAGE}", [MediaItem(video(None, None).pictures, "image")], ["holds 2 pictures"]),
        ("x", [MediaItem(image().pictures, "audio")], ["'audio'"]),
        (7, [], ["int"]),
    ],
)
def test_errors_tell_both_numbers(
    processor: PromptProcessor, prompt: Any, items: Any, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        processor.from_text(prompt, items)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_long_video_is_cheap(processor: PromptProcessor) -> None:
    frames = video(*[(1, 2)] * 64)
    elapsed = []
    for _ in range(4):
        start = time.process_time()
        encoded = processor.from_text(f"<|im_start|>user\n{VIDEO}\nWhat happens?<|im_end|>", [frames])
        elapsed.append(time.process_time() - start)
        assert_runs(processor, encoded, [frames])
    assert min(elapsed) < 0.05
