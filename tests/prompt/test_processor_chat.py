from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huoyan.errors import InputError, ModelError
from huoyan.media.types import SliceRules
from huoyan.prompt.chat_template import ChatTemplate
from huoyan.prompt.messages import MediaPart, Message, Part, TextPart
from huoyan.prompt.processor import PromptProcessor
from huoyan.prompt.tokenizer import Tokenizer

from .checkpoint import CHATML, image, video, written
from .test_processor_text import assert_runs, grids
from .texts import hostile, innocent

TRIMMING = CHATML.replace("message['content'] +", "message['content'] | trim +")


def turn(role: Any, *parts: Part | str) -> Message:
    return Message(role, tuple(TextPart(p) if isinstance(p, str) else p for p in parts))


def with_template(processor: PromptProcessor, source: str) -> PromptProcessor:
    return PromptProcessor(processor.tokenizer, ChatTemplate(source), processor.rules, processor.version)


roles = st.sampled_from(["user", "assistant"])


@given(texts=st.lists(st.tuples(roles, innocent), min_size=1, max_size=4), system=st.none() | innocent)
@settings(max_examples=200, deadline=None)
def test_innocent_conversations_as_transformers_encodes_them(
    processor: PromptProcessor, reference: Any, texts: list[tuple[str, str]], system: str | None
) -> None:
    turns = ([] if system is None else [("system", system)]) + texts
    messages = [turn(role, text) for role, text in turns]
    plain = [{"role": role, "content": text} for role, text in turns]
    for source in (CHATML, TRIMMING):
        for generation in (True, False):
            encoded = with_template(processor, source).from_messages(messages, generation)
            rendered = reference.apply_chat_template(
                plain, chat_template=source, tokenize=False, add_generation_prompt=generation
            )
            assert encoded.text == rendered
            assert encoded.token_ids == reference(rendered, add_special_tokens=False).input_ids


@given(
    texts=st.lists(st.tuples(roles, hostile), min_size=1, max_size=4),
    system=st.none() | hostile,
    source=st.sampled_from([CHATML, TRIMMING]),
)
@settings(max_examples=300, deadline=None)
def test_nothing_can_be_forged(
    processor: PromptProcessor, texts: list[tuple[str, str]], system: str | None, source: str
) -> None:
    turns = ([] if system is None else [("system", system)]) + texts
    processor = with_template(processor, source)
    tokenizer = processor.tokenizer
    encoded = processor.from_messages([turn(role, text) for role, text in turns])
    # The special tokens are those of the same conversation about nothing, and between them is the text.
    innocent_ids = processor.from_messages([turn(role, "x") for role, _ in turns]).token_ids
    special = tokenizer.special_ids
    assert [i for i in encoded.token_ids if i in special] == [i for i in innocent_ids if i in special]
    if system is None:
        turns = [("system", "You are a helpful assistant."), *turns]
    expected: list[int] = []
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    for role, text in turns:
        content = text.strip() if source == TRIMMING else text
        expected += [start, *tokenizer.encode_plain(f"{role}\n{content}"), end, *tokenizer.encode_plain("\n")]
    assert encoded.token_ids == [*expected, start, *tokenizer.encode_plain("assistant\n")]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pictures_anywhere_as_the_model_s_own_chat_has_them(
    processor: PromptProcessor, data: st.DataObject
) -> None:
    tokenizer = processor.tokenizer
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    messages, items = [], []
    expected = [start, *tokenizer.encode_plain("system\nBe brief."), end, *tokenizer.encode_plain("\n")]
    images = 0
    for _ in range(data.draw(st.integers(1, 3))):
        parts: list[Part] = []
        ids: list[int] = [start]
        pending = "user"
        for _ in range(data.draw(st.integers(1, 4))):
            pending += "\n"
            kind = data.draw(st.sampled_from(["text", "image", "video"]))
            if kind == "text":
                text = data.draw(hostile)
                parts.append(TextPart(text))
                pending += text
                continue
            if kind == "image":
                grid = data.draw(grids)
                item, pictures = image(grid), [written(grid, images)]
                images += 1
            else:
                frames = data.draw(st.lists(grids, min_size=1, max_size=3))
                item, pictures = video(*frames), [written(grid) for grid in frames]
            parts.append(MediaPart(item))
            items.append(item)
            for i, picture in enumerate(pictures):
                pending += "\n" if i else ""
                ids += [*tokenizer.encode_plain(pending), *tokenizer.encode_with_specials(picture)]
                pending = ""
        messages.append(turn("user", *parts))
        expected += [*ids, *tokenizer.encode_plain(pending), end, *tokenizer.encode_plain("\n")]
    encoded = processor.from_messages([turn("system", "Be brief."), *messages], add_generation_prompt=False)
    assert encoded.token_ids == expected
    assert_runs(processor, encoded, items)


def test_one_picture_and_a_question(processor: PromptProcessor, reference: Any) -> None:
    encoded = processor.from_messages([turn("user", MediaPart(image((2, 2))), "请描述这张图片")])
    content = written((2, 2), 0) + "\n请描述这张图片"
    rendered = reference.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert encoded.token_ids == reference(rendered).input_ids
    assert encoded.text == rendered.replace(written((2, 2), 0), "(<image>./</image>)")


@pytest.mark.parametrize("source", [CHATML, TRIMMING])
@pytest.mark.parametrize(
    "answer", ["The sky", "The sky is  ", "  The sky", "", "<|im_end|> <unk>", "x <|im_"]
)
def test_continuing_the_last_message(
    processor: PromptProcessor, reference: Any, source: str, answer: str
) -> None:
    messages = [turn("user", "hi"), turn("assistant", answer)]
    encoded = with_template(processor, source).from_messages(messages, False, continue_final_message=True)
    if answer:
        rendered = reference.apply_chat_template(
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}],
            chat_template=source,
            tokenize=False,
            continue_final_message=True,
        )
        assert encoded.text == rendered
    tokenizer = processor.tokenizer
    start = len(encoded.token_ids) - encoded.token_ids[::-1].index(tokenizer.special_tokens["<|im_start|>"])
    content = answer.strip() if source == TRIMMING else answer
    # With nothing to continue, what is left is the template's own opening of the turn.
    opening = "assistant\n" + content
    assert encoded.token_ids[start:] in (
        tokenizer.encode_plain(opening),
        tokenizer.encode_plain(opening.rstrip()),
    )
    if content:
        assert encoded.token_ids[start:] == tokenizer.encode_plain(opening)


def test_variables_of_the_template(processor: PromptProcessor) -> None:
    source = "{{ greeting }}{% for key in table %}{{ table[key][0] }}{% endfor %}" + CHATML
    own = with_template(processor, source)
    variables = {"greeting": "<|im_end|>hello", "table": {"a": ["<unk>"]}}
    encoded = own.from_messages([turn("user", "hi")], template_variables=variables)
    assert encoded.text is not None
    assert encoded.text.startswith("<|im_end|>hello<unk><|im_start|>")
    plain = processor.tokenizer.encode_plain("<|im_end|>hello<unk>")
    assert encoded.token_ids[: len(plain)] == plain


def test_edges_cannot_complete_a_marker(tokenizer: Tokenizer) -> None:
    source = (
        "{% for m in messages %}<|im_{{ m.content | trim }}|><{{ m.content }}>{{ m.content }}>{% endfor %}"
    )
    processor = PromptProcessor(tokenizer, ChatTemplate(source), SliceRules(), "2.6")
    for text in (
        "end",
        "start",
        " end ",
        "image",
        "unk",
        "/image",
        "x<unk",
        "image>",
        "<|im_end|",
        "|im_end|",
    ):
        ids = processor.from_messages([turn("user", text)], add_generation_prompt=False).token_ids
        assert tokenizer.special_ids.isdisjoint(ids), text
        assert tokenizer.decode(ids) == f"<|im_{text.strip()}|><{text}>{text}>"


def test_templates_that_lose_or_move_pictures(processor: PromptProcessor) -> None:
    messages = [turn("user", MediaPart(image()), "a"), turn("user", MediaPart(image()), "b")]
    for source in (
        "{{ messages[0].content }}",
        "{{ messages[1].content }}{{ messages[0].content }}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ):
        with pytest.raises(ModelError, match="pictures"):
            with_template(processor, source).from_messages(messages)
    for cut in ("[:-2]", "[:-8]", "[4:]", "[9:]"):
        with pytest.raises(ModelError, match="pieces"):
            with_template(processor, f"{{{{ messages[0].content{cut} }}}}").from_messages(
                [turn("user", "<unk>")]
            )
    with pytest.raises(InputError, match="continued"):
        with_template(processor, "hi").from_messages([turn("user", "a")], False, continue_final_message=True)


def test_refusals(processor: PromptProcessor) -> None:
    with pytest.raises(InputError, match="exclude each other"):
        processor.from_messages([turn("user", "a")], True, continue_final_message=True)
    with pytest.raises(InputError, match="empty"):
        processor.from_messages([])
    with pytest.raises(ModelError, match="no chat template"):
        PromptProcessor(processor.tokenizer, None, SliceRules()).from_messages([turn("user", "a")])
