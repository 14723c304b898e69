"""Reading the checkpoint's small text files, with one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huoyan.errors import ModelError
from huoyan.models.config import read_json


def read_text(path: Path) -> str:
    """The file's text (UTF-8). Raises ModelError naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read ({error}): download it again") from None


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The file's JSON object; an absent file reads as empty."""
    return read_json(path) if path.exists() else {}
