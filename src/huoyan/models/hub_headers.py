"""What a checkpoint on the Hugging Face hub holds, from its headers alone: some hundred kilobytes of 16 gigabytes."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huoyan.errors import ModelError
from huoyan.models.checkpoint import INDEX, SINGLE
from huoyan.models.safetensors_header import MAX_HEADER, TensorInfo, parse_header

FIRST_READ = 256 * 1024
"""Bytes of a weight file that are asked for at first: a header is seldom longer."""
_LARGEST_TEXT = 32 * 2**20
_TIMEOUT = 30


def fetch_headers(name: str, revision: str | None, folder: Path) -> dict[str, TensorInfo]:
    """Bring the two files that describe the model `name` into `folder`, and read what its weight files hold.

    The endpoint, mirrors and tokens are those of huggingface_hub (`HF_ENDPOINT`, `HF_TOKEN`).

    Raises:
        ModelError: not found, gated, no network, no safetensors; one line that says what to do.
    """
    from huoyan.models.hub_huggingface import friendly_errors, no_telemetry

    with friendly_errors(name, revision), no_telemetry():
        for file in ("config.json", "preprocessor_config.json"):
            found = _text(name, revision, file)
            if found is None:
                raise ModelError(f"{name} has no {file}: it is not a checkpoint huoyan can read")
            (folder / file).write_bytes(found)
        tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(name, revision):
            for info in _header(name, revision, file):
                tensors[info.name] = info
    return tensors


def _weight_files(name: str, revision: str | None) -> list[str]:
    index = _text(name, revision, INDEX)
    if index is None:
        return [SINGLE]
    try:
        files = sorted({str(file) for file in json.loads(index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f"{name}: {INDEX} has no weight_map: it is not a checkpoint huoyan can read"
        ) from None
    if any(Path(file).name != file for file in files):
        raise ModelError(f"{name}: {INDEX} names files outside of its folder: refusing to read them")
    return files


def _header(name: str, revision: str | None, file: str) -> list[TensorInfo]:
    place = _locate(name, revision, file)
    if place is None:
        raise ModelError(
            f"{name} has no {file} on the hub: pickled weights can run code and are not read; look for a "
            "revision or a conversion with *.safetensors"
        )
    url, size = place
    start = _read(url, 0, FIRST_READ)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(MAX_HEADER, (size or MAX_HEADER) - 8):
        raise ModelError(f"{file} of {name} is not a safetensors file")
    text = start[8 : 8 + length]
    if len(text) < length:
        text += _read(url, 8 + len(text), length - len(text))
    if len(text) < length:
        raise ModelError(f"{file} of {name} ends inside its header: the hub's copy is damaged")
    tensors, end = parse_header(text, Path(file))
    if size is not None and size != 8 + length + end:
        raise ModelError(f"{file} of {name} has {size} bytes where its header promises {8 + length + end}")
    return tensors


def _text(name: str, revision: str | None, file: str) -> bytes | None:
    """A small file, None where the repository has none of that name."""
    place = _locate(name, revision, file)
    return None if place is None else _read(place[0], 0, _LARGEST_TEXT)


def _locate(name: str, revision: str | None, file: str) -> tuple[str, int | None] | None:
    """(where the hub keeps a file, its size)."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    from huoyan.models.hub_huggingface import endpoint

    url = hf_hub_url(name, file, revision=revision, endpoint=endpoint())
    try:
        found = get_hf_file_metadata(url, library_name="huoyan")
    except EntryNotFoundError:
        return None
    return found.location, found.size


def _read(url: str, first: int, count: int) -> bytes:
    """At most `count` bytes from `first` on, whether or not the server knows ranges."""
    headers: dict[str, str] = {"Range": f"bytes={first}-{first + count - 1}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers={**_own_headers(url), **headers})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            if answer.status != 206 and first:
                _skip(answer, first)
            return bytes(answer.read(count))
    except urllib.error.HTTPError as error:
        raise ModelError(
            f"{urlsplit(url).hostname} answers HTTP {error.code} to a request for part of a file: try again "
            "later, or set HF_ENDPOINT to a mirror"
        ) from None
    except urllib.error.URLError as error:
        raise ConnectionError(str(error.reason)) from None


def _own_headers(url: str) -> dict[str, str]:
    """The token is for the hub itself, not for the store that it sends one to."""
    from huggingface_hub.utils._headers import build_hf_headers

    from huoyan.models.hub_huggingface import endpoint

    with_token = urlsplit(url).netloc == urlsplit(endpoint()).netloc
    return dict(build_hf_headers(library_name="huoyan", token=None if with_token else False))


def _skip(answer: Any, count: int) -> None:
    while count > 0:
        piece = answer.read(min(count, 1 << 20))
        if not piece:
            return
        count -= len(piece)
