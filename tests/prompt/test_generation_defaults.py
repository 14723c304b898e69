from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from huoyan.errors import ModelError
from huoyan.prompt.generation_defaults import GenerationDefaults
from huoyan.prompt.tokenizer import Tokenizer

from .checkpoint import SPECIAL, train, write_folder


def test_version_2_6(folder: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.special_tokens
    defaults = GenerationDefaults.from_folder(folder, tokenizer, "2.6")
    assert defaults.stop_token_ids == tuple(sorted([ids["<|im_end|>"], ids["<|endoftext|>"]]))
    assert defaults.sampling == {}
    assert defaults.do_sample is None


def test_older_versions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert GenerationDefaults.from_folder(tmp_path, tokenizer, "2.0").stop_token_ids == (
        tokenizer.eos_token_id,
    )
    inner = train()
    inner.add_special_tokens([AddedToken("<|eot_id|>", special=True)])
    llama = Tokenizer.from_folder(write_folder(tmp_path, inner, eos_token="</s>"))
    ids = llama.special_tokens
    defaults = GenerationDefaults.from_folder(tmp_path, llama, "2.5")
    assert defaults.stop_token_ids == tuple(sorted([ids["</s>"], ids["<|eot_id|>"]]))


def test_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    end, text = tokenizer.special_tokens["<|im_end|>"], tokenizer.special_tokens["<|endoftext|>"]

    def read(version: str = "2.0", **generation: object) -> GenerationDefaults:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return GenerationDefaults.from_folder(tmp_path, tokenizer, version)

    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert read().stop_token_ids == (7, end)
    assert read(eos_token_id=[9, 8]).stop_token_ids == (8, 9, end)
    assert read("2.6", eos_token_id=9).stop_token_ids == tuple(sorted([9, end, text]))
    found = read(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=100, repetition_penalty=1.05, max_new_tokens=9
    )
    assert found.do_sample is True
    assert found.sampling == {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 100,
        "repetition_penalty": 1.05,
        "max_tokens": 9,
    }
    assert read(do_sample=False, temperature=None).sampling == {}
    with pytest.raises(ModelError, match="temperature must be a number"):
        read(temperature="hot")
    for wrong in ("x", [1, "x"], -1, True):
        with pytest.raises(ModelError, match="eos_token_id"):
            read(eos_token_id=wrong)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        GenerationDefaults.from_folder(tmp_path, tokenizer, "2.6")


def test_nothing_to_stop_at(tmp_path: Path) -> None:
    inner = train(special=SPECIAL[3:])
    config = {"eos_token": None, "bos_token": None, "pad_token": None}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, inner, **config))
    with pytest.raises(ModelError, match="no answer would ever end"):
        GenerationDefaults.from_folder(tmp_path, tokenizer, "2.6")
