"""Download a checkpoint from the Hugging Face hub or a mirror of it, into huggingface_hub's own cache."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huoyan.errors import ModelError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

DATA_FILES = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "*.tiktoken",
]
"""What is fetched: no code, no pickled weights."""
SUBFOLDERS = ["*/*"]
LARGE = 32 * 2**20
_GIB = 2**30
_HTTP_LIBRARIES = ("requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2")


def download(name: str, revision: str | None, cache: Path | None, progress: bool) -> Path:
    """Bring the data files of `name` here and return their snapshot folder.

    Raises:
        ModelError: not found, gated, no network, no space, no safetensors; one line that says what to do.
    """
    from huggingface_hub import constants, snapshot_download

    root = cache or Path(constants.HF_HUB_CACHE)
    show = progress and sys.stderr.isatty()
    with friendly_errors(name, revision), _quiet(not show), no_telemetry():
        info = _model_info(name, revision)
        wanted = _data_files(name, info)
        _check_space(name, wanted, root)
        for file in wanted:
            _resume_large(name, info, file, root)
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=root,
                allow_patterns=DATA_FILES,
                ignore_patterns=SUBFOLDERS,
                library_name="huoyan",
            )
        )


def _model_info(name: str, revision: str | None) -> ModelInfo:
    from huggingface_hub import HfApi

    return HfApi(library_name="huoyan").model_info(name, revision=revision, files_metadata=True)


def _data_files(name: str, info: ModelInfo) -> list[RepoSibling]:
    from fnmatch import fnmatch

    files = info.siblings or []
    wanted = [
        file
        for file in files
        if "/" not in file.rfilename and any(fnmatch(file.rfilename, pattern) for pattern in DATA_FILES)
    ]
    if not any(file.rfilename.endswith(".safetensors") for file in wanted):
        raise ModelError(
            f"{name} has no safetensors weights on the hub: pickled weights can run code and are not read; "
            "look for a revision or a conversion with *.safetensors"
        )
    return wanted


def _check_space(name: str, files: list[RepoSibling], root: Path) -> None:
    blobs = _blobs(root, name)
    needed = sum(
        file.size or 0
        for file in files
        if not (blobs / (file.lfs.sha256 if file.lfs else file.blob_id or "?")).exists()
    )
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise ModelError(
            f"{name} needs {needed / _GIB:.1f} GiB more in {root}, where {free / _GIB:.1f} GiB are free: "
            "make room or set HF_HOME to a larger disk"
        )


def _resume_large(name: str, info: ModelInfo, file: RepoSibling, root: Path) -> None:
    """Fetch a large file into the cache's blobs, going on where an earlier attempt stopped.

    huggingface_hub throws a partial file away when its process ends, so on a slow line a shard of several
    gigabytes may never arrive. `snapshot_download` then finds the blob and only links it. Who asks for the
    hub's fastest way (`HF_XET_HIGH_PERFORMANCE=1`) gets that instead.
    """
    if not file.lfs or (file.size or 0) < LARGE or os.environ.get("HF_XET_HIGH_PERFORMANCE"):
        return
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    blob = _blobs(root, name) / file.lfs.sha256
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(blob.name + ".huoyan-partial")
    url = hf_hub_url(name, file.rfilename, revision=info.sha)
    with _locked(partial), partial.open("ab") as target:
        if blob.exists():
            return
        done = target.tell()
        if file.size is not None and done > file.size:
            target.truncate(done := 0)
        http_get(
            url,
            target,
            resume_size=done,
            headers=build_hf_headers(library_name="huoyan"),
            expected_size=file.size,
            displayed_filename=file.rfilename,
        )
        target.flush()
        if _sha256(partial) != file.lfs.sha256:
            partial.unlink()
            raise ModelError(f"{file.rfilename} of {name} arrived damaged and was thrown away: try again")
        partial.replace(blob)


def _blobs(root: Path, name: str) -> Path:
    return root / ("models--" + name.replace("/", "--")) / "blobs"


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Two processes must not append to one partial file; the system's lock dies with its holder."""
    from filelock import FileLock

    with FileLock(f"{partial}.lock"):
        yield
    Path(f"{partial}.lock").unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet(silent: bool) -> Iterator[None]:
    """No progress bars into a pipe or a log file."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if not silent or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def no_telemetry() -> Iterator[None]:
    """huggingface_hub tells the hub about the program that calls it, unless told not to."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


@contextlib.contextmanager
def friendly_errors(name: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    from huoyan.models.hub import TINY_HINT

    where = endpoint()
    try:
        yield
    except ModelError:
        raise
    except errors.GatedRepoError:
        raise ModelError(
            f"{name} is gated: accept its terms on {where}/{name}, then run `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{where} has no model {name} (or it is private): check the name; for private models set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision!r}: leave it out, or check the name") from None
    except errors.HFValidationError:
        raise ModelError(f"{name!r} is not a hub name: those look like openbmb/MiniCPM-V-2_6") from None
    except errors.HfHubHTTPError as error:
        raise ModelError(_http_message(name, where, error)) from None
    except PermissionError as error:
        raise ModelError(f"cannot write {error.filename}: set HF_HOME to a writable folder") from None
    except Exception as error:
        if not _is_network_error(error):
            raise
        raise ModelError(
            f"{name} is not on this machine and {where} cannot be reached ({type(error).__name__}): "
            f"check the network or set HF_ENDPOINT to a mirror, or try --hub modelscope; {TINY_HINT}"
        ) from None


def _http_message(name: str, where: str, error: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"{where} refused {name} (401): set HF_TOKEN or run `hf auth login`"
    if status == 403:
        return f"{where} refused {name} (403): accept its terms on {where}/{name} with the token's account"
    if status == 429:
        return f"{where} answers 'too many requests': go on in some minutes (what has arrived is kept)"
    return f"{where} failed for {name} (HTTP {status}): try again later, or set HF_ENDPOINT to a mirror"


def _is_network_error(error: BaseException) -> bool:
    """huggingface_hub has used several HTTP libraries in turn: their errors are known by where they live."""
    from huggingface_hub import errors

    if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        return True
    return type(error).__module__.split(".")[0] in _HTTP_LIBRARIES


def endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT).rstrip("/")
