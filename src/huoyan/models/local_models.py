"""Which checkpoints are on this machine, and whether they are whole: from files, without torch or network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huoyan.errors import ModelError
from huoyan.models.safetensors_header import read_header

Source = Literal["embedded", "huggingface", "modelscope", "folder"]

EMBEDDED = {"tiny": "checkpoint", "tiny-int4": "checkpoint-int4"}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class LocalModel:
    """One checkpoint found on the disk. `size` is in bytes; `missing` names the files it lacks."""

    name: str
    source: Source
    path: Path
    size: int
    version: str | None
    dtype: str | None
    int4: bool
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not self.missing


def embedded_folder(name: str) -> Path:
    """Where the package keeps `tiny` or `tiny-int4`."""
    import huoyan

    return Path(huoyan.__file__).parent / "tiny" / EMBEDDED[name]


def missing_files(folder: Path) -> tuple[str, ...]:
    """The files a checkpoint folder lacks before it can be opened, by name; empty where it is whole.

    A link whose target is not there yet (a download in progress) counts as missing.
    """
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if (folder / _INDEX).is_file():
        weight_map = _json(folder / _INDEX).get("weight_map")
        shards = sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing += [name for name in shards if not (folder / name).is_file()] if shards else [_INDEX]
    elif not (folder / "model.safetensors").is_file():
        missing.append("model.safetensors")
    return tuple(missing)


def describe(name: str, source: Source, folder: Path) -> LocalModel:
    """What `huoyan models` says about one folder."""
    config = _json(folder / "config.json")
    dtype = config.get("torch_dtype") or config.get("dtype")
    version = config.get("version")
    return LocalModel(
        name=name,
        source=source,
        path=folder,
        size=_folder_size(folder),
        version=None if version is None else str(version),
        dtype=None if dtype is None else str(dtype),
        int4=_holds_int4(folder, config),
        missing=missing_files(folder),
    )


def _holds_int4(folder: Path, config: Mapping[str, Any]) -> bool:
    """By the tensors' names, as `quantization_config` may be missing; by that where there are no tensors yet."""
    weight_map = _json(folder / _INDEX).get("weight_map")
    if isinstance(weight_map, dict):
        names = [str(name) for name in weight_map]
    else:
        try:
            names = [info.name for info in read_header(folder / "model.safetensors")]
        except ModelError:
            said = config.get("quantization_config")
            return isinstance(said, dict) and said.get("bits") == 4
    return any(name.endswith((".qweight", ".weight_packed")) for name in names)


def list_local_models() -> list[LocalModel]:
    """The embedded models, then the MiniCPM-V checkpoints of the Hugging Face and ModelScope caches."""
    found = [
        describe(name, "embedded", embedded_folder(name))
        for name in EMBEDDED
        if embedded_folder(name).is_dir()
    ]
    found += [describe(name, "huggingface", folder) for name, folder in _huggingface_snapshots()]
    found += [describe(name, "modelscope", folder) for name, folder in _modelscope_folders()]
    return found


def huggingface_cache() -> Path:
    """Where huggingface_hub keeps models (`HF_HUB_CACHE`, `HF_HOME`), without importing it."""
    explicit = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def modelscope_roots(cache: Path | None = None) -> list[Path]:
    """Where the ModelScope SDK keeps models; its versions have used several places."""
    explicit = cache or os.environ.get("MODELSCOPE_CACHE")
    base = Path(explicit).expanduser() if explicit else Path.home() / ".cache" / "modelscope"
    return [base / "models", base / "hub" / "models", base / "hub", base]


def modelscope_folder(name: str, cache: Path | None = None) -> Path | None:
    """The folder of a ModelScope model that has been downloaded (perhaps in part), in any known layout."""
    owner, _, model = name.partition("/")
    safe = model.replace(".", "___")
    for root in modelscope_roots(cache):
        snapshots = root / f"{owner}--{model}" / "snapshots"
        if snapshots.is_dir():
            revisions = sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
            if revisions:
                return revisions[0]
        for candidate in (root / owner / safe, root / owner / model):
            if candidate.is_dir() and any(candidate.iterdir()):
                return candidate
    return None


def huggingface_snapshot(name: str, revision: str | None, cache: Path | None = None) -> Path | None:
    """The snapshot folder of a model that has been downloaded (perhaps in part)."""
    repository = (cache or huggingface_cache()) / ("models--" + name.replace("/", "--"))
    wanted = revision or "main"
    try:
        commit = (repository / "refs" / wanted).read_text(encoding="utf-8").strip()
    except OSError:
        commit = wanted
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None


def _huggingface_snapshots() -> Iterator[tuple[str, Path]]:
    cache = huggingface_cache()
    for repository in sorted(cache.glob("models--*--*")):
        name = repository.name.removeprefix("models--").replace("--", "/", 1)
        folder = huggingface_snapshot(name, None, cache)
        if folder is None:
            snapshots = sorted((repository / "snapshots").glob("*"))
            folder = snapshots[-1] if snapshots else None
        if folder is not None and _is_ours(folder):
            yield name, folder


def _modelscope_folders() -> Iterator[tuple[str, Path]]:
    seen: set[Path] = set()
    for root in modelscope_roots():
        configs = [*root.glob("*/*/config.json"), *root.glob("*--*/snapshots/*/config.json")]
        for config in sorted(configs):
            folder = config.parent
            if folder.resolve() in seen or not _is_ours(folder):
                continue
            seen.add(folder.resolve())
            if folder.parent.name == "snapshots":
                yield folder.parent.parent.name.replace("--", "/", 1), folder
            else:
                yield f"{folder.parent.name}/{folder.name.replace('___', '.')}", folder


def _is_ours(folder: Path) -> bool:
    return _json(folder / "config.json").get("model_type") == "minicpmv"


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
