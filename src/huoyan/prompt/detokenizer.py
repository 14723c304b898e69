"""Token ids to text, a token at a time, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from copy import copy
from typing import Protocol

from huoyan.prompt.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns one answer's ids into text as they come.

    What `push` and `final` return, put together, is `tokenizer.decode` of all ids. A character whose bytes
    are spread over tokens is held back until it is whole, or until it is certain never to be.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._decoder: _Decoder = (
            _ByteDecoder(tokenizer, skip_special_tokens)
            if tokenizer.is_byte_level
            else _WindowDecoder(tokenizer, skip_special_tokens, spaces_between_special_tokens)
        )

    def push(self, ids: int | Sequence[int]) -> str:
        """The text that these further ids complete; may be empty."""
        if isinstance(ids, int):
            return self._decoder.push(ids)
        return "".join([self._decoder.push(token_id) for token_id in ids])

    def final(self) -> str:
        """What was held back, U+FFFD for bytes that are no character. Call once, at the end."""
        return self._decoder.final()

    def copy(self) -> IncrementalDetokenizer:
        """One that goes on from here by itself (answers of one prompt fork)."""
        twin = copy(self)
        twin._decoder = self._decoder.copy()
        return twin


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def final(self) -> str: ...

    def copy(self) -> _Decoder: ...


class _ByteDecoder:
    """For byte-level vocabularies, where a text is its tokens' bytes side by side."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._bytes_of(token_id))

    def final(self) -> str:
        return self._utf8.decode(b"", final=True)

    def copy(self) -> _ByteDecoder:
        twin = copy(self)
        twin._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        twin._utf8.setstate(self._utf8.getstate())
        return twin


class _WindowDecoder:
    """For any vocabulary: decodes the last few ids with and without the new one.

    The ids before the held ones stay in the window because a decoder may treat the first token of a text
    differently from the same token further on.
    """

    # A character has at most four bytes, so what four tokens left broken stays so.
    _LONGEST_TAIL = 4

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, spaces: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces
        self._shown: list[int] = []
        self._held: list[int] = []
        self._broken = 0

    def push(self, token_id: int) -> str:
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        self._held.append(token_id)
        before = self._text(self._shown)
        text = self._text([*self._shown, *self._held])
        self._broken = self._broken + 1 if text.endswith("\ufffd") else 0
        if 0 < self._broken < self._LONGEST_TAIL:
            return ""
        if len(text) > len(before):
            # Tokens that show nothing alone must not become the whole context of the next ones.
            self._shown, self._held, self._broken = self._held, [], 0
            return text[len(before) :]
        return ""

    def final(self) -> str:
        before = self._text(self._shown)
        text = self._text([*self._shown, *self._held])
        self._held = []
        return text[len(before) :]

    def copy(self) -> _WindowDecoder:
        twin = copy(self)
        twin._held = self._held.copy()
        return twin

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip, self._spaces)
