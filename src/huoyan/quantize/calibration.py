"""What the quantizer looks at: pictures, questions and answers, as the model would see them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huoyan.errors import InputError, MediaError
from huoyan.media.picture import Picture
from huoyan.media.prepare import prepare_items
from huoyan.media.types import MediaItem
from huoyan.prompt.messages import parse_messages

if TYPE_CHECKING:
    from torch import Tensor

    from huoyan.models.minicpmv import MiniCPMV
    from huoyan.prompt.processor import PromptProcessor

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DEFAULT_QUESTIONS = ("Describe this picture.", "请描述这张图片")
MAX_ITEMS = 512
SHARES = (0.3, 0.2, 0.5)
"""Of what counts: positions that foretell an answer, other words, pieces of pictures. By number alone pictures would
have nearly all, but the loss is 50 to 1000 times as sensitive to a position that foretells an answer as to one of a
picture (`tiny`, benchmarks/NOTES.md). More than this for the answers and there are too few of them to go by."""


@dataclass(frozen=True)
class CalibrationItem:
    """A question about pictures and, where it is known, its answer."""

    question: str
    pictures: tuple[Picture, ...] = ()
    answer: str = ""
    max_slices: int | None = None
    """Slices of a picture at most; None leaves it to the checkpoint's rules."""


@dataclass
class EncodedItem:
    """One item as the decoder sees it."""

    token_ids: list[int]
    answer_start: int
    """Tokens from here on are the answer."""
    embeddings: Tensor | None = field(default=None, repr=False)
    """[len(token_ids), hidden]"""
    is_text: Tensor = field(init=False, repr=False)
    """bool [len(token_ids)] on the CPU: which embeddings are words and not pieces of pictures."""


def read_calibration(source: str | Path | None) -> list[CalibrationItem]:
    """The built-in set, or one's own.

    Args:
        source: None; a folder of pictures (each is described, in English and in Chinese); or a JSONL file of
            `{"question": …, "image" or "images": path(s), "answer": …}`, paths relative to the file.

    Raises:
        InputError, MediaError: one line that names the file and the line.
    """
    if source is None:
        from huoyan.quantize.builtin_set import builtin_items

        return builtin_items()
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in PICTURE_SUFFIXES)
        if not files:
            raise InputError(
                f"{path} has no pictures to calibrate with ({', '.join(sorted(PICTURE_SUFFIXES))})"
            )
        return [
            CalibrationItem(DEFAULT_QUESTIONS[i % 2], (Picture.open(file),))
            for i, file in enumerate(files[:MAX_ITEMS])
        ]
    if not path.is_file():
        raise InputError(f"{path} does not exist: --calibration takes a folder of pictures or a JSONL file")
    items = list(_read_lines(path))
    if not items:
        raise InputError(f"{path} has no line to calibrate with")
    return items[:MAX_ITEMS]


def _read_lines(path: Path) -> Iterable[CalibrationItem]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{where} is not a JSON object")
        question = row.get("question", row.get("prompt"))
        if not isinstance(question, str) or not question.strip():
            raise InputError(f'{where} has no "question"')
        images = row.get("images", row.get("image", []))
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise InputError(f'{where}: "images" must be a path or a list of paths')
        try:
            pictures = tuple(Picture.open(str(path.parent / image)) for image in images)
        except MediaError as error:
            raise MediaError(f"{where}: {error}") from None
        yield CalibrationItem(question, pictures, str(row.get("answer", "")))


def encode_items(items: Sequence[CalibrationItem], processor: PromptProcessor, max_tokens: int) -> list[Any]:
    """Token ids and prepared pictures of each item, cut to `max_tokens`; pictures are encoded by `embed`."""
    out = []
    for item in items:
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in item.pictures]
        content.append({"type": "text", "text": item.question})
        load = partial(_media_items, max_slices=item.max_slices)
        messages = parse_messages([{"role": "user", "content": content}], load)
        prompt = processor.from_messages(messages)
        ids = list(prompt.token_ids)
        if len(ids) >= max_tokens:
            continue
        answer = processor.tokenizer.encode_plain(item.answer) if item.answer else []
        end = processor.tokenizer.token_to_id("<|im_end|>")
        full = [*ids, *answer, *([end] if answer and end is not None else [])][:max_tokens]
        media = [MediaItem((picture,), max_slice_nums=item.max_slices) for picture in item.pictures]
        out.append((EncodedItem(full, len(ids)), prompt.slots, prepare_items(media, processor.rules)))
    if not out:
        raise InputError(f"no calibration item fits in {max_tokens} tokens: use smaller pictures")
    return out


def token_weights(items: Sequence[EncodedItem]) -> Tensor:
    """How much each token of the items, end to end, counts: kinds have their SHARES, the mean is 1."""
    import torch

    is_text = torch.cat([item.is_text for item in items])
    foretells = torch.cat(
        [torch.arange(len(item.token_ids)) >= max(item.answer_start - 1, 0) for item in items]
    )
    weights = torch.zeros(len(is_text))
    for kind, share in zip((foretells, is_text & ~foretells, ~is_text & ~foretells), SHARES, strict=True):
        weights[kind] = share / max(int(kind.sum()), 1)
    return weights / weights.mean()


def _media_items(parts: Sequence[tuple[str, Any]], max_slices: int | None) -> list[MediaItem]:
    return [MediaItem((source,), kind, max_slice_nums=max_slices) for kind, source in parts]


def embed_items(encoded: Sequence[Any], model: MiniCPMV) -> list[EncodedItem]:
    """Fill the embeddings: token embeddings, with the pictures' where their slots are."""
    import torch

    items = []
    for item, slots, prepared in encoded:
        x = model.embed(torch.tensor(item.token_ids, device=model.device))
        item.is_text = torch.ones(len(item.token_ids), dtype=torch.bool)
        for slot, picture in zip(slots, prepared, strict=True):
            embeddings = model.encode_slices(picture.slices)
            for offset, slice_embedding in zip(slot.offsets, embeddings, strict=True):
                x[offset : offset + slot.length] = slice_embedding
                item.is_text[offset : offset + slot.length] = False
        item.embeddings = x
        items.append(item)
    return items
