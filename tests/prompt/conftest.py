from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers

from huoyan.media.types import SliceRules
from huoyan.prompt.chat_template import ChatTemplate
from huoyan.prompt.processor import PromptProcessor
from huoyan.prompt.tokenizer import Tokenizer

from .checkpoint import CHATML, train, write_folder


@pytest.fixture(scope="session")
def inner() -> tokenizers.Tokenizer:
    return train()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, inner: tokenizers.Tokenizer) -> Path:
    return write_folder(tmp_path_factory.mktemp("checkpoint"), inner)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def processor(tokenizer: Tokenizer) -> PromptProcessor:
    template = ChatTemplate(CHATML, tokenizer.named_special_tokens)
    return PromptProcessor(tokenizer, template, SliceRules(), "2.6")


@pytest.fixture(scope="session")
def reference(folder: Path) -> Any:
    """The same folder as transformers reads it."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)
