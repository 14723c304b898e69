"""Prompts that come as token ids: where their picture placeholders are."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.errors import InputError
from huoyan.prompt.placeholders import PLACEHOLDERS

if TYPE_CHECKING:
    from huoyan.prompt.tokenizer import Tokenizer


@dataclass(frozen=True)
class FoundPlaceholder:
    kind: str


def checked_ids(token_ids: Sequence[int]) -> list[int]:
    """A list of ints, none negative. Raises InputError."""
    try:
        ids = [operator.index(i) for i in token_ids]
    except TypeError:
        raise InputError("prompt_token_ids must be a flat list of integers") from None
    if not ids:
        raise InputError("prompt_token_ids is empty: a prompt has at least one token")
    if min(ids) < 0:
        raise InputError(f"prompt_token_ids holds {min(ids)}: token ids are not negative")
    return ids


def split_at_placeholders(
    ids: list[int], tokenizer: Tokenizer, with_videos: bool
) -> list[list[int] | FoundPlaceholder]:
    """Cut ids at encoded placeholders such as `(<image>./</image>)`.

    `<image>` is a token of its own, but the brackets may have become one token with the text around them,
    and `(<video>./</video>)` is plain text to many tokenizers. Where a placeholder ends within a token, the
    plain text up to the next special token is encoded anew; all other ids stay as they are.
    """
    pieces: list[list[int] | FoundPlaceholder] = [ids]
    for kind, placeholder in PLACEHOLDERS.items():
        if kind == "video" and not with_videos:
            continue
        shape = tokenizer.split_at_specials(placeholder)
        out: list[list[int] | FoundPlaceholder] = []
        for piece in pieces:
            if isinstance(piece, FoundPlaceholder):
                out.append(piece)
            elif len(shape) == 1:
                out += _split_plain(piece, placeholder, kind, tokenizer)
            else:
                out += _split_tagged(piece, shape, kind, tokenizer)
        pieces = out
    return pieces


def _split_tagged(
    ids: list[int], shape: list[str | int], kind: str, tokenizer: Tokenizer
) -> list[list[int] | FoundPlaceholder]:
    opening, closing = str(shape[0]), str(shape[-1])
    core = [
        i for part in shape[1:-1] for i in ([part] if isinstance(part, int) else tokenizer.encode_plain(part))
    ]
    starts = _find_all(ids, core)
    ends = [start + len(core) for start in starts]
    regions = [ids[a:b] for a, b in zip([0, *ends], [*starts, len(ids)], strict=True)]
    out: list[list[int] | FoundPlaceholder] = []
    current = regions[0]
    for region in regions[1:]:
        before = _drop_end(current, opening, tokenizer)
        after = _drop_start(region, closing, tokenizer)
        if before is None or after is None:
            current = [*current, *core, *region]
        else:
            out += [before, FoundPlaceholder(kind)]
            current = after
    return [*out, current]


def _split_plain(
    ids: list[int], placeholder: str, kind: str, tokenizer: Tokenizer
) -> list[list[int] | FoundPlaceholder]:
    encoded = tokenizer.encode_plain(placeholder)
    out: list[list[int] | FoundPlaceholder] = [[]]
    for stretch in _stretches(ids, tokenizer.special_ids):
        count = 0 if stretch[0] in tokenizer.special_ids else tokenizer.decode(stretch).count(placeholder)
        starts = _find_all(stretch, encoded) if count else []
        parts = [stretch]
        if len(starts) == count:
            ends = [start + len(encoded) for start in starts]
            parts = [stretch[a:b] for a, b in zip([0, *ends], [*starts, len(stretch)], strict=True)]
        elif "\ufffd" not in (text := tokenizer.decode(stretch)):
            parts = [tokenizer.encode_plain(part) for part in text.split(placeholder)]
        for i, part in enumerate(parts):
            if i:
                out += [FoundPlaceholder(kind), []]
            last = out[-1]
            assert isinstance(last, list)
            last += part
    return out


def _drop_end(ids: list[int], text: str, tokenizer: Tokenizer) -> list[int] | None:
    """The ids without the text they end with; None where they do not."""
    exact = tokenizer.encode_plain(text)
    if ids[-len(exact) :] == exact:
        return ids[: -len(exact)]
    begin = next((i + 1 for i in range(len(ids) - 1, -1, -1) if ids[i] in tokenizer.special_ids), 0)
    for start in (begin, len(ids) - 1):
        plain = tokenizer.decode(ids[start:])
        if start < len(ids) and "\ufffd" not in plain and plain.endswith(text):
            return ids[:start] + tokenizer.encode_plain(plain.removesuffix(text))
    return None


def _drop_start(ids: list[int], text: str, tokenizer: Tokenizer) -> list[int] | None:
    """The ids without the text they begin with; None where they do not."""
    exact = tokenizer.encode_plain(text)
    if ids[: len(exact)] == exact:
        return ids[len(exact) :]
    end = next((i for i, token_id in enumerate(ids) if token_id in tokenizer.special_ids), len(ids))
    for stop in (end, 1):
        plain = tokenizer.decode(ids[:stop])
        if "\ufffd" not in plain and plain.startswith(text):
            return tokenizer.encode_plain(plain.removeprefix(text)) + ids[stop:]
    return None


def _stretches(ids: list[int], special_ids: frozenset[int]) -> list[list[int]]:
    """Runs of plain ids, and each special id by itself."""
    out: list[list[int]] = []
    open_run = False
    for token_id in ids:
        is_special = token_id in special_ids
        if is_special or not open_run:
            out.append([token_id])
        else:
            out[-1].append(token_id)
        open_run = not is_special
    return out


def _find_all(ids: list[int], wanted: list[int]) -> list[int]:
    """Where `wanted` begins in `ids`, without overlaps."""
    found: list[int] = []
    start = 0
    while True:
        try:
            start = ids.index(wanted[0], start)
        except ValueError:
            return found
        if ids[start : start + len(wanted)] == wanted:
            found.append(start)
            start += len(wanted)
        else:
            start += 1
