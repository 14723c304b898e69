"""The checkpoint's tokenizer: text to ids with or without special tokens, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huoyan.errors import InputError, ModelError
from huoyan.prompt.files import read_json_if_there

if TYPE_CHECKING:
    import tokenizers

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`. Safe to share between threads once built.

    Two encoders share one vocabulary in memory: the checkpoint's own, which turns the text `<|im_end|>` into
    that special token, and a plain one, for which it is only text.
    """

    def __init__(self, inner: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        """`config` is the content of tokenizer_config.json."""
        config = config or {}
        inner.no_truncation()
        inner.no_padding()
        _add_configured_tokens(inner, config)
        self._inner = inner
        self._added = inner.get_added_tokens_decoder()
        self.named_special_tokens: dict[str, str] = {
            name: content for name in _NAMED if (content := _content(config.get(name))) is not None
        }
        """As the checkpoint names them: `{"eos_token": "<|im_end|>", …}`."""
        self.special_tokens: dict[str, int] = {t.content: i for i, t in self._added.items() if t.special}
        self.special_ids: frozenset[int] = frozenset(self.special_tokens.values())
        self.eos_token_id: int | None = self._named_id("eos_token")
        self.bos_token_id: int | None = self._named_id("bos_token")
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.prefix_ids, self.suffix_ids = _wrapping(inner)
        """What the checkpoint puts around every text that is not from the chat template (often nothing)."""
        self._protected = self.special_ids
        self._plain = self._plain_encoder(frozenset(self.special_tokens))
        self._bytes: dict[int, bytes] = {}
        self._patterns: dict[frozenset[str], re.Pattern[str]] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and `tokenizer_config.json`. Raises ModelError naming the file at fault."""
        from tokenizers import Tokenizer as Inner

        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path}: no such file; the checkpoint needs its tokenizer, download it again")
        config = read_json_if_there(folder / "tokenizer_config.json")
        try:
            inner = Inner.from_file(str(path))
        except Exception as error:  # `tokenizers` raises bare Exception
            reason = " ".join(str(error).split())
            raise ModelError(f"{path}: not a usable tokenizer ({reason}); download it again") from None
        return cls(inner, config)

    def protect(self, tokens: Iterable[str]) -> None:
        """Let `encode_plain` treat these tokens as special too (call before sharing between threads)."""
        tokens = frozenset(tokens)
        ids = frozenset(i for t in tokens if (i := self.token_to_id(t)) is not None)
        if ids <= self._protected:
            return
        self._protected |= ids
        self._plain = self._plain_encoder(tokens | {t.content for i, t in self._added.items() if t.special})

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special; never yields a special token's id."""
        if not text:
            return []
        ids: list[int] = self._plain.encode(_encodable(text), add_special_tokens=False).ids
        return ids if self._protected.isdisjoint(ids) else self._without_protected(ids)

    def encode_with_specials(self, text: str, without: frozenset[str] = frozenset()) -> list[int]:
        """Ids of a text in which special tokens stand for themselves, save those named in `without`.

        What the tokenizer adds around a text by itself is left out (see `prefix_ids`).
        """
        if not without:
            ids: list[int] = self._inner.encode(_encodable(text), add_special_tokens=False).ids
            return ids
        ids = []
        for piece in self.split_at_specials(text, without):
            ids += [piece] if isinstance(piece, int) else self.encode_plain(piece)
        return ids

    def split_at_specials(self, text: str, without: frozenset[str] = frozenset()) -> list[str | int]:
        """Plain stretches (str) and special tokens (their ids) of a text, in order."""
        pattern = self._patterns.get(without)
        if pattern is None:
            pattern = self._patterns[without] = self._special_pattern(without)
        pieces: list[str | int] = []
        start = 0
        for match in pattern.finditer(text):
            if match.start() > start:
                pieces.append(text[start : match.start()])
            pieces.append(self.special_tokens[match.group(1)])
            start = match.end()
        if start < len(text):
            pieces.append(text[start:])
        return pieces

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of the ids; ids outside the vocabulary give nothing.

        `spaces_between_special_tokens` is there for callers who pass it: tokenizers of this kind never put
        spaces between tokens, whatever it says.
        """
        text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._inner.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it (byte-level tokens look like `Ġhello`)."""
        found: str | None = self._inner.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token of a byte-level vocabulary stands for; empty for ids outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self.id_to_token(token_id)
            found = b"" if token is None else _token_bytes(token)
            self._bytes[token_id] = found
        return found

    @property
    def is_byte_level(self) -> bool:
        """Whether decoding is putting bytes side by side, so that it can be done token by token."""
        return type(self._inner.decoder).__name__ == "ByteLevel"

    def _named_id(self, name: str) -> int | None:
        content = self.named_special_tokens.get(name)
        return None if content is None else self.token_to_id(content)

    def _plain_encoder(self, special: frozenset[str]) -> tokenizers.Tokenizer:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Inner

        plain = Inner(self._inner.model)
        if self._inner.normalizer is not None:
            plain.normalizer = self._inner.normalizer
        if self._inner.pre_tokenizer is not None:
            plain.pre_tokenizer = self._inner.pre_tokenizer
        # In id order, as the vocabulary numbers them: an added token's id is its turn.
        for token_id, token in sorted(self._added.items()):
            add = plain.add_special_tokens if token.content in special else plain.add_tokens
            add(
                [
                    AddedToken(
                        token.content,
                        single_word=token.single_word,
                        lstrip=token.lstrip,
                        rstrip=token.rstrip,
                        normalized=token.normalized,
                        special=token.content in special,
                    )
                ]
            )
            if plain.token_to_id(token.content) != token_id:
                raise ModelError(f"tokenizer.json: added token {token.content!r} breaks the numbering")
        plain.encode_special_tokens = True
        return plain

    def _special_pattern(self, without: frozenset[str]) -> re.Pattern[str]:
        # Longest first: where one special token begins with another, the longer wins, as in `tokenizers`.
        tokens = sorted((t for t in self.special_tokens if t not in without), key=len, reverse=True)
        if not tokens:
            return re.compile(r"(?!)")
        flags = {t.content: t for t in self._added.values()}
        before = "|".join(re.escape(t) for t in tokens if flags[t].lstrip)
        after = "|".join(re.escape(t) for t in tokens if flags[t].rstrip)
        words = "|".join(re.escape(t) for t in tokens if flags[t].single_word)
        pattern = "(" + "|".join(re.escape(t) for t in tokens) + ")"
        if words:
            pattern = rf"(?:(?<!\w)(?=(?:{words})(?!\w))|(?!{words})){pattern}"
        if before:
            pattern = rf"(?:\s*(?={before}))?{pattern}"
        if after:
            pattern = rf"{pattern}(?:(?<={after.replace('|', ')|(?<=')})\s*)?"
        return re.compile(pattern)

    def _without_protected(self, ids: list[int]) -> list[int]:
        # A vocabulary may also reach a special token by merging plain text: spell such a token out.
        spelled: list[int] = []
        for token_id in ids:
            if token_id not in self._protected:
                spelled.append(token_id)
                continue
            content = self._inner.decode([token_id], skip_special_tokens=False)
            for character in content:
                some = self._plain.encode(character, add_special_tokens=False).ids
                if not self._protected.isdisjoint(some):
                    raise InputError(
                        f"the text contains {content!r}, which this tokenizer cannot write plainly"
                    )
                spelled += some
        return spelled


def _byte_alphabet() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in printable}
    others = (b for b in range(0x100) if chr(b) not in alphabet)
    return alphabet | {chr(0x100 + i): b for i, b in enumerate(list(others))}


_BYTE_ALPHABET = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_ALPHABET[character] for character in token])
    except KeyError:
        # An added token is written as it is.
        return token.encode("utf-8")


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode: a lone surrogate at character {error.start}; decode it as UTF-8"
        ) from None
    return text


def _content(token: Any) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _add_configured_tokens(inner: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Bring the tokens that only tokenizer_config.json knows, or calls special, into the tokenizer."""
    from tokenizers import AddedToken

    known = inner.get_added_tokens_decoder()
    special = {t.content for t in known.values() if t.special}
    named = [_content(config.get(name)) for name in _NAMED]
    listed = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if isinstance(listed, Mapping):
        listed = list(listed.values())
    wanted = {c for c in [*named, *map(_content, listed)] if c is not None}
    entries = config.get("added_tokens_decoder") or {}
    try:
        decoder = sorted((int(i), dict(entry)) for i, entry in entries.items())
    except (TypeError, ValueError, AttributeError):
        raise ModelError("tokenizer_config.json: added_tokens_decoder is not a table of tokens") from None
    for token_id, entry in decoder:
        content = _content(entry)
        if content is None:
            continue
        is_special = bool(entry.get("special")) or content in wanted
        if (
            inner.token_to_id(content) is not None
            and token_id in known
            and (content in special or not is_special)
        ):
            continue
        flags = {k: bool(entry[k]) for k in ("single_word", "lstrip", "rstrip", "normalized") if k in entry}
        add = inner.add_special_tokens if is_special else inner.add_tokens
        add([AddedToken(content, special=is_special, **flags)])
        special |= {content} if is_special else set()
        if inner.token_to_id(content) != token_id:
            raise ModelError(
                f"tokenizer_config.json numbers {content!r} {token_id}, but tokenizer.json "
                f"{inner.token_to_id(content)}; the two files are of different checkpoints"
            )
    late = sorted(c for c in wanted - special if inner.token_to_id(c) is not None)
    inner.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in late])


def _wrapping(inner: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the tokenizer's post-processor puts before and after a text."""
    if inner.post_processor is None:
        return (), ()
    bare = len(inner.encode("a", add_special_tokens=False).ids)
    encoding = inner.encode("a", add_special_tokens=True)
    mask = encoding.special_tokens_mask
    before = mask.index(0) if 0 in mask else 0
    return tuple(encoding.ids[:before]), tuple(encoding.ids[before + bare :])
