"""The tokenizer of tiny: size, round trips, printed words by character, and transformers reads the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from huoyan_training.families import sample_any
from huoyan_training.lettering import choose_word
from huoyan_training.painter import texts_only
from huoyan_training.tokenizer import SPECIALS, VOCABULARY, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(path, n_examples=1500)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_size_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size(with_added_tokens=True) == VOCABULARY == 1024
    assert [tokenizer.token_to_id(s) for s in SPECIALS] == list(range(VOCABULARY - len(SPECIALS), VOCABULARY))


def test_any_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in ("龘 🙂 naïve\r\n\tx", "请描述这张图片", "it's 3.14%", "a" * 300, "\u0000\uffff", "ﬁ"):
        import unicodedata

        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_printed_words_are_single_characters(tokenizer: Tokenizer, seed: int) -> None:
    from random import Random

    dice = Random(seed)
    for _ in range(300):
        word = choose_word(dice, "train")
        for text in (
            f'It says "{word}".',
            f"上面写着“{word}”。",
            f'There is a sign that says "{word}" on the grass.',
        ):
            tokens = [tokenizer.decode([i]) for i in tokenizer.encode(text).ids]
            start = next(k for k, t in enumerate(tokens) if t.strip() in ('"', "“"))
            assert tokens[start + 1 : start + 1 + len(word)] == list(word)


def test_sentences_are_short(tokenizer: Tokenizer, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with texts_only():
        answers = [a for _ in range(300) for _, a in sample_any(rng, "train")[1].turns]
    lengths = [len(tokenizer.encode(a).ids) for a in answers]
    assert np.mean(lengths) < 16
    assert max(lengths) < 100


def test_same_corpus_same_files(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(tmp_path, n_examples=1500)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in tmp_path.iterdir()
    }


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("config", [False, True])
def test_transformers_reads_the_folder(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, trust: bool, config: bool
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    auto = pytest.importorskip("transformers").AutoTokenizer
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if config:
        model = {"version": 2.6, "architectures": ["MiniCPMV"], "model_type": "minicpmv", "vocab_size": 1024}
        (tmp_path / "config.json").write_text(json.dumps(model))
    loaded = auto.from_pretrained(str(tmp_path), trust_remote_code=trust)
    assert len(loaded) == VOCABULARY
    assert (loaded.eos_token, loaded.pad_token, loaded.unk_token) == ("<|im_end|>", "<|endoftext|>", "<unk>")
    for text in (
        "There are two red cars.",
        "晴朗的蓝天上",
        'It says "Open12".',
        "<image><unk></image>",
        " é ü",
    ):
        assert (
            loaded(text, add_special_tokens=False)["input_ids"]
            == tokenizer.encode(text, add_special_tokens=False).ids
        )
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    messages = [{"role": "user", "content": "(<image>./</image>)\n请描述这张图片"}]
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n(<image>./</image>)\n请描述这张图片<|im_end|>\n<|im_start|>assistant\n"
    )
