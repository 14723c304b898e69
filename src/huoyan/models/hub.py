"""From the name of a model to the folder its files are in, downloading it where that was asked for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from huoyan.errors import InputError, ModelError
from huoyan.models.local_models import (
    EMBEDDED,
    embedded_folder,
    huggingface_snapshot,
    missing_files,
    modelscope_folder,
)

Hub = Literal["huggingface", "modelscope"]
HUBS: tuple[Hub, ...] = ("huggingface", "modelscope")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_CHOICES = "a checkpoint folder, a hub name such as openbmb/MiniCPM-V-2_6, or tiny"
TINY_HINT = "`--model tiny` runs the embedded demonstration model without a download"


def resolve_model(
    name: str | os.PathLike[str],
    *,
    hub: str = "huggingface",
    revision: str | None = None,
    offline: bool | None = None,
    progress: bool = True,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of a checkpoint: a folder itself, `tiny`, `tiny-int4`, or a hub name.

    A hub model that is already whole in the cache is used as it is, without touching the network; otherwise
    it is downloaded, going on where an earlier download stopped. Only data is fetched (JSON, safetensors,
    templates, tokenizer files), never code or pickled weights.

    Args:
        hub: where hub names are looked up, `huggingface` (mirrors and tokens: `HF_ENDPOINT`, `HF_TOKEN`) or
            `modelscope`.
        revision: a branch, tag or commit of the hub's repository.
        offline: never touch the network; None reads `HF_HUB_OFFLINE`.
        progress: show a progress bar; it is only drawn on a terminal.
        cache_dir: where downloads are kept instead of the hub's usual cache.

    Raises:
        ModelError: there is no such folder or model, or it cannot be downloaded; the line says what to do.
        InputError: the name or the hub is not one.
    """
    found = _here_or_name(name, hub)
    if isinstance(found, Path):
        return found
    return _from_hub(found, hub, revision, is_offline() if offline is None else offline, progress, cache_dir)


def find_model(
    name: str | os.PathLike[str],
    *,
    hub: str = "huggingface",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path | None:
    """The folder of a checkpoint that is whole on this machine; None for a hub name that is not.

    Raises:
        ModelError, InputError: as `resolve_model`, save for the network, which is not touched.
    """
    found = _here_or_name(name, hub)
    if isinstance(found, Path):
        return found
    present, lacking = _cached(
        found, hub, revision, None if cache_dir is None else Path(cache_dir).expanduser()
    )
    return None if lacking else present


def _here_or_name(name: str | os.PathLike[str], hub: str) -> Path | str:
    """A folder that is here, or a name for a hub."""
    text = os.fspath(name)
    if not text.strip():
        raise InputError(f"the model's name is empty: give {_CHOICES}")
    if hub not in HUBS:
        raise InputError(f"unknown hub {hub!r}: use huggingface or modelscope")
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if text in EMBEDDED:
        return _embedded(text)
    if folder.is_file():
        raise ModelError(f"{text} is a file: give the folder of the checkpoint that holds config.json")
    if not _HUB_NAME.fullmatch(text) or isinstance(name, Path):
        raise ModelError(_not_found(text))
    return text


def is_offline() -> bool:
    """Whether the environment forbids the network (`HF_HUB_OFFLINE=1`)."""
    return any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in _OFFLINE)


def _embedded(name: str) -> Path:
    folder = embedded_folder(name)
    if not folder.is_dir():
        raise ModelError(
            f"this installation does not carry the embedded model {name!r}: install huoyan's wheel again"
        )
    return folder


def _not_found(text: str) -> str:
    if text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or "\\" in text:
        return f"there is no folder {text}: give {_CHOICES}"
    return (
        f"no model {text!r}: it is neither a folder here nor a hub name "
        f"(those look like openbmb/MiniCPM-V-2_6); {TINY_HINT}"
    )


def _cached(
    name: str, hub: str, revision: str | None, cache: Path | None
) -> tuple[Path | None, tuple[str, ...]]:
    """(the hub's folder for a model where there is one, the files it lacks)."""
    if hub == "huggingface":
        present = huggingface_snapshot(name, revision, cache)
    else:
        # Its folders do not say which revision they hold, so only the SDK can answer for a named one.
        present = modelscope_folder(name, cache) if revision is None else None
    return present, missing_files(present) if present is not None else ()


def _from_hub(
    name: str, hub: str, revision: str | None, offline: bool, progress: bool, cache_dir: str | Path | None
) -> Path:
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    present, lacking = _cached(name, hub, revision, cache)
    if present is not None and not lacking:
        return present
    if offline:
        state = f"only partly downloaded (no {lacking[0]})" if lacking else "not downloaded"
        raise ModelError(
            f"{name} is {state} and the network is switched off (HF_HUB_OFFLINE): "
            f"download it once online; {TINY_HINT}"
        )
    if hub == "huggingface":
        from huoyan.models.hub_huggingface import download
    else:
        from huoyan.models.hub_modelscope import download
    folder = download(name, revision, cache, progress)
    lacking = missing_files(folder)
    if lacking:
        raise ModelError(
            f"{name} on {hub} has no {', '.join(lacking[:3])}: it is not a checkpoint huoyan can read"
        )
    return folder
