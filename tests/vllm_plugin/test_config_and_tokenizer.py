"""The two other files of a folder: `config.json` as transformers takes it, and the tokenizer."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings

import huoyan.tiny
from huoyan.bench.text_files import SPECIAL_TOKENS, train_tokenizer, write_text_files
from huoyan.prompt.tokenizer import Tokenizer
from huoyan.vllm_plugin.config import MiniCPMVConfig
from huoyan.vllm_plugin.tokenizer import MiniCPMVTokenizerFast, load_tokenizer
from tests.conftest import SEED
from tests.prompt.texts import hostile
from tests.vllm_plugin.published import publish

TINY = Path(huoyan.tiny.__file__).parent / "checkpoint"


def test_config_keeps_every_size(tmp_path: Path) -> None:
    folder = publish(TINY, tmp_path / "published", patch_size=99)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = MiniCPMVConfig.from_pretrained(str(folder))
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "query_num",
                 "image_size", "version", "eos_token_id", "drop_vision_last_layer"):  # fmt: skip
        assert getattr(config, name) == raw[name], name
    for name, value in raw["vision_config"].items():
        assert getattr(config.vision_config, name) == value, name
    assert config.rope_parameters["rope_theta"] == raw["rope_theta"]
    assert config.patch_size == raw["vision_config"]["patch_size"]
    assert config.get_text_config() is config


def test_config_travels_between_processes() -> None:
    config = MiniCPMVConfig.from_pretrained(str(TINY))
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other.to_dict() == config.to_dict()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[MiniCPMVTokenizerFast, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_text_files(folder, train_tokenizer(1900, seed=SEED))
    return load_tokenizer(str(folder)), Tokenizer.from_folder(folder)


@given(text=hostile)
@settings(max_examples=200, deadline=None)
def test_token_ids_are_the_engines(both: tuple[MiniCPMVTokenizerFast, Tokenizer], text: str) -> None:
    theirs, ours = both
    assert (
        theirs.encode(text)
        == theirs.encode(text, add_special_tokens=False)
        == ours.encode_with_specials(text)
    )


def test_tokens_around_pictures() -> None:
    tokenizer = load_tokenizer(str(TINY), truncation_side="left", mistral_format=False, use_fast=True)
    assert type(tokenizer) is MiniCPMVTokenizerFast
    vocabulary = tokenizer.get_vocab()
    for name in ("im_start", "im_end", "slice_start", "slice_end", "im_id_start", "im_id_end"):
        token = getattr(tokenizer, name)
        assert token in SPECIAL_TOKENS
        assert getattr(tokenizer, f"{name}_id") == vocabulary[token]
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == tuple(
        vocabulary[token] for token in ("<unk>", "<|im_start|>", "<|im_end|>")
    )
    assert [tokenizer.newline_id] == tokenizer.encode("\n")


@pytest.mark.parametrize("named", ["MiniCPMVTokenizer", "Qwen2TokenizerFast", None])
def test_whatever_class_the_folder_names(tmp_path: Path, named: str | None) -> None:
    write_text_files(tmp_path, train_tokenizer(), text={"tokenizer_class": named})
    assert type(load_tokenizer(str(tmp_path))) is MiniCPMVTokenizerFast
