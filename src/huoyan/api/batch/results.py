"""The output file: one line a row, in the order of the input, appended and never rewritten."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from huoyan.errors import HuoyanError, InputError

FSYNC_SECONDS = 1.0


class ResultFile:
    """Lines that survive being killed: each is one write, and the disk is told at least every second.

    What a killed run left is kept: `done` rows, whose ids are `ids`; a torn last line is cut off.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError where the file is no such output, or is being written by another process."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        try:
            _lock(self._file, path)
            self.ids = _read_ids(self._file, path)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    @property
    def done(self) -> int:
        """Rows that were there when it was opened."""
        return len(self.ids)

    def append(self, record: dict[str, Any]) -> None:
        """Write one row's line."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            written = self._file.write(line)
            while written is not None and written < len(line):
                line = line[written:]
                written = self._file.write(line)
            if time.monotonic() - self._synced >= FSYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise HuoyanError(
                f"cannot write {self._path}: {error.strerror}; make room and run the same command to go on"
            ) from None

    def close(self) -> None:
        """Make it durable and let others have it."""
        if not self._file.closed:
            self._sync()
            self._file.close()

    def _sync(self) -> None:
        # Pipes and /dev/null have nothing to sync.
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(
            f"another process is writing {path}: wait for it, or choose another output"
        ) from None


def _read_ids(file: BinaryIO, path: Path) -> list[Any]:
    """The id of every whole line; what follows the last whole line is cut off."""
    ids: list[Any] = []
    whole = 0
    file.seek(0)
    reader = path.open("rb")
    with reader:
        for line in reader:
            record = _record(line)
            if record is None:
                break
            ids.append(record.get("custom_id", record.get("id")))
            whole += len(line)
        if any(_record(line) is not None for line in reader):
            raise InputError(
                f"line {len(ids) + 1} of {path} is damaged and others follow it: "
                "repair or move it away, then run the command again"
            )
    file.truncate(whole)
    file.seek(0, os.SEEK_END)
    return ids


def _record(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or not ("id" in value or "custom_id" in value):
        return None
    return value
