"""Which of `huoyan ask`'s words are pictures and which is the question."""

from __future__ import annotations

import re
from pathlib import Path

from huoyan.errors import InputError

_URL = re.compile(r"(https?|data|file):", re.IGNORECASE)
_FILE_NAME = re.compile(
    r"[^?？!！\n]*\.(jpe?g|png|webp|gif|bmp|tiff?|heic|avif|ppm|mp4|m4v|mov|mkv|webm|avi|mpe?g|ts|flv|wmv)",
    re.IGNORECASE,
)
_USAGE = 'huoyan ask PICTURE... "question"'


def split_arguments(arguments: list[str], videos: list[str]) -> tuple[list[str], str]:
    """The pictures and the question, which comes last.

    Raises:
        InputError: the question was forgotten or not quoted, or a picture does not exist.
    """
    *pictures, question = arguments
    if _is_picture(question):
        raise InputError(f"the question is missing after {_short(question)!r}: {_USAGE}")
    if not question.strip():
        raise InputError(f"the question is empty: {_USAGE}")
    if pictures.count("-") > 1:
        raise InputError("- (standard input) can be given once")
    for picture in pictures:
        if not _is_there(picture):
            raise InputError(_not_there(picture, question))
    for video in videos:
        if not _URL.match(video) and not Path(video).expanduser().is_file():
            raise InputError(f"there is no video {_short(video)!r}")
    return pictures, question


def _is_picture(word: str) -> bool:
    return word == "-" or _is_there(word) or bool(_FILE_NAME.fullmatch(word.strip()))


def _is_there(word: str) -> bool:
    if word == "-" or _URL.match(word):
        return True
    try:
        return Path(word).expanduser().is_file()
    except OSError:
        return False


def _is_folder(word: str) -> bool:
    try:
        return Path(word).expanduser().is_dir()
    except OSError:
        return False


def _not_there(word: str, question: str) -> str:
    if _is_folder(word):
        return f"{_short(word)!r} is a folder: name the pictures in it, or use `huoyan batch` for many"
    if _FILE_NAME.fullmatch(word) or "/" in word:
        return f"there is no picture {_short(word)!r}"
    return f"there is no picture {_short(word)!r}: put the question in quotes, {_USAGE}"


def _short(word: str) -> str:
    return word if len(word) <= 80 else word[:77] + "..."
