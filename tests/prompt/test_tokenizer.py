from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors

from huoyan.errors import InputError, ModelError
from huoyan.prompt.tokenizer import Tokenizer

from .checkpoint import SPECIAL, TAGS, train, write_folder
from .texts import hostile, innocent


def test_reads_the_folder_as_transformers_does(tokenizer: Tokenizer, reference: Any) -> None:
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.special_ids == set(reference.all_special_ids)
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.bos_token_id == reference.bos_token_id
    for token in ("<unk>", "<|im_end|>", "Ġthe"):
        assert tokenizer.token_to_id(token) == reference.convert_tokens_to_ids(token)
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert tokenizer.id_to_token(-1) is None


@given(text=hostile)
@settings(max_examples=300, deadline=None)
def test_encodes_with_specials_as_transformers_does(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids = reference(text).input_ids
    assert tokenizer.encode_with_specials(text) == ids
    pieces = tokenizer.split_at_specials(text)
    assert [i for p in pieces for i in ([p] if isinstance(p, int) else tokenizer.encode_plain(p))] == ids


@given(text=hostile)
@settings(max_examples=300, deadline=None)
def test_plain_text_is_never_special(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids = tokenizer.encode_plain(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert ids == reference(text, split_special_tokens=True).input_ids


@given(text=innocent)
@settings(max_examples=200, deadline=None)
def test_plain_equals_special_for_innocent_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode_plain(text) == tokenizer.encode_with_specials(text)


@given(text=hostile)
@settings(max_examples=200, deadline=None)
def test_specials_can_be_left_out_by_name(tokenizer: Tokenizer, text: str) -> None:
    without = frozenset(TAGS)
    ids = tokenizer.encode_with_specials(text, without)
    tag_ids = {tokenizer.special_tokens[tag] for tag in TAGS}
    assert tag_ids.isdisjoint(ids)
    others = [token for token in SPECIAL if token not in without]
    assert sum(i in tokenizer.special_ids for i in ids) == sum(text.count(token) for token in others)


@given(ids=st.lists(st.integers(0, 1600), max_size=40), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_decodes_as_transformers_does(
    tokenizer: Tokenizer, reference: Any, ids: list[int], skip: bool
) -> None:
    known = [i for i in ids if i < tokenizer.vocab_size]
    assert tokenizer.decode(ids, skip) == reference.decode(known, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip, False) == tokenizer.decode(ids, skip, True)


def _inner_whose_merges_reach_unk() -> tokenizers.Tokenizer:
    """As the published vocabulary has it: `<unk>` is an ordinary entry, and here one that merges spell."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("<", "u"), ("n", "k"), ("<u", "nk"), ("<unk", ">")]
    vocab = letters | {a + b: len(letters) + i for i, (a, b) in enumerate(merges)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return inner


def test_special_tokens_that_merges_could_spell(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, _inner_whose_merges_reach_unk()))
    unk = tokenizer.special_tokens["<unk>"]
    assert unk < min(i for t, i in tokenizer.special_tokens.items() if t != "<unk>")
    assert tokenizer.encode_with_specials("a<unk>b")[1] == unk
    ids = tokenizer.encode_plain("a<unk>b<un")
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "a<unk>b<un"


def test_ordinary_added_tokens_stay_in_plain_text(tmp_path: Path) -> None:
    inner = train()
    inner.add_tokens([AddedToken("<think>", normalized=False), AddedToken("日本語", normalized=True)])
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, inner))
    think = tokenizer.token_to_id("<think>")
    assert think not in tokenizer.special_ids
    assert tokenizer.encode_plain("a <think><unk>日本語") == [
        *tokenizer.encode_plain("a "),
        think,
        *tokenizer.encode_plain("<unk>"),
        tokenizer.token_to_id("日本語"),
    ]
    tokenizer.protect(["<think>"])
    assert think not in tokenizer.encode_plain("a <think><unk>日本語")
    assert tokenizer.decode(tokenizer.encode_plain("a <think><unk>日本語")) == "a <think><unk>日本語"


def test_flags_of_special_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    inner = train()
    inner.add_special_tokens(
        [
            AddedToken("<l>", lstrip=True, normalized=False),
            AddedToken("<r>", rstrip=True, normalized=False),
            AddedToken("word", single_word=True, normalized=False),
            AddedToken("<l>r", normalized=False),
        ]
    )
    write_folder(tmp_path, inner)
    tokenizer = Tokenizer.from_folder(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "a  <l> b",
        "a <r>  b",
        "a word b",
        "swords",
        "<l>r",
        " <l>  <r> ",
        "word",
        "<r>\n\n<l>x",
        "aword",
    ):
        assert tokenizer.encode_with_specials(text) == reference(text).input_ids, text
        pieces = tokenizer.split_at_specials(text)
        split = [i for p in pieces for i in ([p] if isinstance(p, int) else tokenizer.encode_plain(p))]
        assert split == reference(text).input_ids, text


def test_tokens_that_only_the_config_knows(tmp_path: Path) -> None:
    inner = train(special=SPECIAL[:3])
    base = inner.get_vocab_size()
    entry = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = {str(base): entry | {"content": "<image>"}, str(base + 1): entry | {"content": "<unk>"}}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, inner, added_tokens_decoder=added))
    assert tokenizer.special_tokens["<unk>"] == base + 1
    assert tokenizer.encode_with_specials("<image><unk>") == [base, base + 1]
    wrong = {str(base + 5): entry | {"content": "<image>"}}
    with pytest.raises(ModelError, match="different checkpoints"):
        Tokenizer.from_folder(write_folder(tmp_path, inner, added_tokens_decoder=wrong))


def test_special_by_name_only(tmp_path: Path) -> None:
    inner = train(special=SPECIAL[:2])
    inner.add_tokens([AddedToken("<|im_end|>", normalized=False)])
    config = {"added_tokens_decoder": None, "additional_special_tokens": None, "unk_token": None}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, inner, **config))
    assert tokenizer.eos_token_id in tokenizer.special_ids
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode_plain("<|im_end|>"))


def test_wrapping_of_a_post_processor(tmp_path: Path) -> None:
    inner = train()
    bos = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, inner))
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((bos,), ())
    assert tokenizer.encode_with_specials("a picture")[0] != bos


def test_truncation_in_the_file_is_ignored(tmp_path: Path) -> None:
    inner = train()
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, inner))
    assert len(tokenizer.encode_with_specials("1234567890")) == 10
    assert len(tokenizer.encode_plain("1")) == 1


def test_missing_and_broken_files(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: no such file") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a usable tokenizer") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"x": 1}}))
    with pytest.raises(ModelError, match="added_tokens_decoder"):
        Tokenizer.from_folder(tmp_path)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode_plain, tokenizer.encode_with_specials):
        with pytest.raises(InputError, match="character 2"):
            encode("ab\ud800")
