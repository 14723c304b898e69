"""Answers that must match a JSON schema, a regular expression, a list of choices or a grammar, through llguidance
(extra `structured`)."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from huoyan.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from huoyan.prompt.tokenizer import Tokenizer


_KEPT_GRAMMARS = 64


class GrammarState:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.known = 0
        """Tokens of the answer that were taken."""

    def update(self, output_ids: list[int]) -> None:
        """Take the tokens that came since the last call."""
        new = output_ids[self.known :]
        if new and not self._matcher.is_stopped():
            self._matcher.try_consume_tokens(new)
        self.known = len(output_ids)

    def allowed(self, device: torch.device) -> Tensor:
        """bool [vocab]: what may follow; only stop tokens once the grammar is at its end."""
        bits = np.zeros((self._vocab_size + 31) // 32, np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        spread = np.unpackbits(bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        return torch.from_numpy(spread.view(np.bool_)).to(device, non_blocking=True)

    def fork(self) -> GrammarState:
        twin = GrammarState(self._matcher.deep_copy(), self._vocab_size)
        twin.known = self.known
        return twin


class GrammarCompiler:
    """Compiles `structured_outputs` for one tokenizer; the tokenizer's tables are made on first use."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_token_ids = sorted(stop_token_ids)
        self._tables: Any = None
        self._recent: OrderedDict[str, GrammarState] = OrderedDict()

    def compile(self, wanted: Mapping[str, Any]) -> GrammarState:
        """The start of a grammar. The most recent grammars are kept: servers are asked for the same again.

        Raises:
            UnsupportedError: llguidance is not installed, or there is no tokenizer.
            InputError: the schema, expression or grammar is wrong; one line with what is.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise UnsupportedError(
                "structured_outputs needs llguidance: pip install 'huoyan[structured]'"
            ) from None
        if self._tokenizer is None or not self._stop_token_ids:
            raise UnsupportedError("structured_outputs needs a checkpoint with a tokenizer and a stop token")
        if self._tables is None:
            self._tables = self._make_tables(self._tokenizer)
        kind, content = next((k, v) for k, v in wanted.items() if v is not None)
        try:
            name = _name(kind, content)
            if name in self._recent:
                self._recent.move_to_end(name)
                return self._recent[name].fork()
            grammar = _grammar(LLMatcher, kind, content)
            problem = LLMatcher.validate_grammar(grammar, self._tables)
        except (ValueError, TypeError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise InputError(f"structured_outputs {kind!r} cannot be used: {' '.join(problem.split())[:300]}")
        start = GrammarState(LLMatcher(self._tables, grammar), self._vocab_size)
        self._recent[name] = start
        if len(self._recent) > _KEPT_GRAMMARS:
            self._recent.popitem(last=False)
        return start.fork()

    def _make_tables(self, tokenizer: Tokenizer) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(_Wrapped(tokenizer, self._vocab_size, self._stop_token_ids[0])),
            n_vocab=self._vocab_size,
            eos_token=self._stop_token_ids,
        )


class _Wrapped:
    """A tokenizer with the attributes that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.special_ids)
        special = frozenset(self.special_token_ids)
        self.tokens = [
            b"" if i in special or tokenizer.id_to_token(i) is None else tokenizer.token_bytes(i)
            for i in range(vocab_size)
        ]
        for i in special:
            if i < vocab_size:
                self.tokens[i] = (tokenizer.id_to_token(i) or "").encode()
        self._encode = tokenizer.encode_plain

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _name(kind: str, content: Any) -> str:
    plain = content if isinstance(content, (str, bool)) else json.dumps(_plain(content), sort_keys=True)
    return f"{kind} {type(content).__name__} {plain}"


def _plain(content: Any) -> Any:
    return dict(content) if isinstance(content, Mapping) else list(content)


def _literally(text: str) -> str:
    """A regular expression that matches `text` alone."""
    return "".join(c if c.isalnum() or ord(c) > 127 else f"\\x{ord(c):02x}" for c in text)


def _grammar(matcher: Any, kind: str, content: Any) -> str:
    if kind == "json_object" or (kind == "json" and content is True):
        content = {"type": "object"}
        kind = "json"
    if kind == "json":
        # A text is read here, for an error that counts its own lines and columns.
        schema = json.dumps(json.loads(content) if isinstance(content, str) else _plain(content))
        return str(matcher.grammar_from_json_schema(schema))
    if kind == "regex":
        return str(matcher.grammar_from_regex(content))
    if kind == "choice":
        return str(matcher.grammar_from_regex("|".join(map(_literally, content))))
    return str(matcher.grammar_from_lark(content))
