from __future__ import annotations

import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from huoyan.prompt.detokenizer import IncrementalDetokenizer
from huoyan.prompt.tokenizer import Tokenizer

from .texts import hostile


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> tuple[list[str], str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    return [detokenizer.push(i) for i in ids], detokenizer.final()


@given(ids=st.lists(st.integers(0, 1560), max_size=60), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_equals_decoding_at_once(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    shown, rest = stream(tokenizer, ids, skip)
    assert "".join(shown) + rest == tokenizer.decode(ids, skip)
    at_once = IncrementalDetokenizer(tokenizer, skip)
    assert at_once.push(ids) + at_once.final() == tokenizer.decode(ids, skip)


@given(data=st.binary(max_size=40) | st.text("请描述飞🙂👩‍👧é½a").map(lambda t: t.encode()[:-1]))
@settings(max_examples=400, deadline=None)
def test_any_bytes(tokenizer: Tokenizer, data: bytes) -> None:
    byte_ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [byte_ids[bytes([b])] for b in data]
    shown, rest = stream(tokenizer, ids)
    assert "".join(shown) + rest == tokenizer.decode(ids) == data.decode("utf-8", "replace")


@given(text=hostile)
@settings(max_examples=200, deadline=None)
def test_never_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    # Written byte by byte: each character must come whole, at its last byte.
    byte_ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    data = text.encode()
    shown, rest = stream(tokenizer, [byte_ids[bytes([b])] for b in data])
    assert rest == ""
    assert "".join(shown) == text
    expected = [character if i else "" for character in text for i in _last_bytes(character)]
    assert shown == expected


def _last_bytes(character: str) -> list[bool]:
    size = len(character.encode())
    return [False] * (size - 1) + [True]


def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_with_specials("a<|im_end|>b<unk>")
    assert "".join(stream(tokenizer, ids)[0]) == "ab"
    assert "".join(stream(tokenizer, ids, skip=False)[0]) == "a<|im_end|>b<unk>"
    split = [tokenizer.encode_plain("你")[0], tokenizer.special_tokens["<unk>"]]
    shown, rest = stream(tokenizer, split, skip=False)
    assert "".join(shown) + rest == tokenizer.decode(split, False)


def test_cost_does_not_grow_with_length(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("请描述这张图片 a picture 🙂 ") * 4000
    elapsed = []
    for _ in range(3):
        start = time.process_time()
        stream(tokenizer, ids)
        elapsed.append(time.process_time() - start)
    assert min(elapsed) / len(ids) < 20e-6


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """A vocabulary of the Llama kind: `▁` for spaces, one space put before a text, bytes as `<0xE4>`."""
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    for piece in ["▁", "▁the", "▁sky", "a", "b", "▁▁", "是", "▁是", "\n", "的", "the", "s", "k", "y"]:
        vocab[piece] = len(vocab)
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<|end|>"])
    return Tokenizer(inner)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_vocabularies_that_are_not_byte_level(pieces: Tokenizer, data: st.DataObject) -> None:
    assert not pieces.is_byte_level
    words = st.integers(257, pieces.vocab_size - 1).map(lambda i: [i])
    spelt = st.sampled_from("你🙂é\t").map(lambda c: [b + 1 for b in c.encode()])
    ids = [i for group in data.draw(st.lists(words | spelt, max_size=15)) for i in group]
    for skip in (True, False):
        shown, rest = stream(pieces, ids, skip)
        assert "".join(shown) + rest == pieces.decode(ids, skip)
        assert "\ufffd" not in "".join(shown)


def test_a_broken_end_comes_with_final(pieces: Tokenizer, tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(pieces)
    assert detokenizer.push([pieces.token_to_id("a"), 0xE4 + 1, 0xBD + 1]) == "a"  # type: ignore[list-item]
    assert detokenizer.final() == "\ufffd\ufffd"
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.final() == ""
