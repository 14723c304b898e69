"""A tokenizer trained on the spot, and a checkpoint folder without weights in the published layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers

from huoyan.bench import text_files
from huoyan.bench.text_files import QWEN2_SPLIT, SPECIAL_TOKENS, train_tokenizer, write_text_files
from huoyan.media.types import MediaItem, SlicePlan

CHATML = text_files.CHATML
PREPROCESSOR = text_files.PREPROCESSOR
SPECIAL = list(SPECIAL_TOKENS)
TAGS = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>", "<unk>")


def train(seed: int = 0, split: str = QWEN2_SPLIT, special: Sequence[str] = SPECIAL) -> tokenizers.Tokenizer:
    return train_tokenizer(seed=seed, split=split, special=special)


def write_folder(folder: Path, inner: tokenizers.Tokenizer, **config: Any) -> Path:
    """Without generation defaults and sizes: what the prompt stage reads, and no more."""
    write_text_files(folder, inner, text=config)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "minicpmv", "version": 2.6}))
    return folder


def picture(grid: tuple[int, int] | None = None) -> Any:
    """Stands for a prepared picture: only its plan matters here."""
    plan = SlicePlan((448, 448)) if grid is None else SlicePlan((448, 448), grid, (448, 448))
    return SimpleNamespace(plan=plan)


def image(grid: tuple[int, int] | None = None, **choices: Any) -> MediaItem:
    return MediaItem((picture(grid),), "image", **choices)


def video(*grids: tuple[int, int] | None, **choices: Any) -> MediaItem:
    return MediaItem(tuple(map(picture, grids)), "video", **choices)


def written(grid: tuple[int, int] | None, number: int | None = None) -> str:
    """A picture's text in version 2.6, spelt out after the description of the format."""
    text = "" if number is None else f"<image_id>{number}</image_id>"
    text += "<image>" + "<unk>" * 64 + "</image>"
    if grid is not None:
        text += "\n".join(["".join(["<slice>" + "<unk>" * 64 + "</slice>"] * grid[0])] * grid[1])
    return text
