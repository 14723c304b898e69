"""Writes a quantized checkpoint a shard at a time, so that an interrupted run goes on where it stopped and a
half-written model never looks whole: everything is in OUT.partial until the last file is there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from huoyan.errors import HuoyanError, InputError
from huoyan.models.checkpoint import INDEX
from huoyan.models.config import read_json

_STATE = "quantize.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".incomplete", ".lock")


class QuantizedWriter:
    """`finished` are the shards that are on disk already, by name."""

    def __init__(
        self, out: Path, fingerprint: Mapping[str, Any], note: Callable[[str], None] = lambda line: None
    ) -> None:
        """Start in `out`.partial, or go on there if it was made with the same `fingerprint`.

        What a run with another fingerprint left is thrown away, and `note` told so.

        Raises:
            InputError: `out` exists and is not empty, or `out`.partial is not of a run of ours.
            HuoyanError: the folder cannot be written.
        """
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists already: give a new folder, or remove it first")
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        state = self.partial / _STATE
        wanted = json.loads(json.dumps(dict(fingerprint)))
        if self.partial.exists() and not state.exists() and any(self.partial.iterdir()):
            raise InputError(f"{self.partial} is in the way and not of a stopped run: move it or remove it")
        self._fingerprint = wanted
        self.notes: dict[str, Any] = {}
        with self._writing():
            if state.exists() and read_json(state).get("made_from") != wanted:
                note(f"{self.partial} is of a run with other options: it is thrown away")
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
            if state.exists():
                self.notes = read_json(state).get("notes", {})
            self._save_state()

    def has(self, shard: str) -> bool:
        """Whether the shard is complete on disk."""
        return shard in self.notes and (self.partial / f"{shard}.safetensors").exists()

    def write(self, shard: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Write a shard and remember `note` about it. Atomic: a crash leaves it out, not half there."""
        from safetensors.torch import save_file

        path = self.partial / f"{shard}.safetensors"
        temporary = path.with_suffix(".tmp")
        with self._writing(temporary):
            save_file(
                {n: t.contiguous().cpu() for n, t in tensors.items()}, temporary, metadata={"format": "pt"}
            )
            # The library makes weights readable to their owner alone, unlike every other file here.
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
            self.notes[shard] = dict(note)
            self._save_state()

    @contextmanager
    def _writing(self, temporary: Path | None = None) -> Iterator[None]:
        """Turns what the disk says into one line; `temporary` is not left behind."""
        try:
            yield
        except Exception as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) or "No space" in str(error) or "I/O error" in str(error):
                raise HuoyanError(
                    f"{self.partial} cannot be written ({error}): make room and run the same command again, it "
                    "goes on where it stopped"
                ) from None
            raise

    def finish(self, source: Path, config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Name the shards, write the index, config and report, copy the other files, and move into place."""
        with self._writing():
            self._finish(source, config, report)

    def _finish(self, source: Path, config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        from huoyan.models.safetensors_header import read_header

        # Everything that takes room comes before the first renaming: a full disk leaves a run to go on with.
        self._dump("quantization_report.json", report)
        for file in sorted(source.iterdir()):
            if file.is_file() and _is_copied(file.name):
                shutil.copyfile(file, self.partial / file.name)
        weight_map: dict[str, str] = {}
        total = 0
        shards = sorted(self.notes)
        names = {
            shard: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, shard in enumerate(shards, 1)
        }
        for shard, name in names.items():
            for info in read_header(self.partial / f"{shard}.safetensors"):
                weight_map[info.name] = name
                total += info.nbytes
        self._dump(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        self._dump("config.json", config)
        for shard, name in names.items():
            os.replace(self.partial / f"{shard}.safetensors", self.partial / name)
        (self.partial / _STATE).unlink()
        if self.out.exists():
            self.out.rmdir()
        os.replace(self.partial, self.out)

    def _save_state(self) -> None:
        self._dump(_STATE, {"made_from": self._fingerprint, "notes": self.notes})

    def _dump(self, name: str, value: Mapping[str, Any]) -> None:
        path = self.partial / name
        temporary = path.with_name(name + ".tmp")
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_copied(name: str) -> bool:
    """Weights and what is written anew stay behind."""
    return not (
        name.endswith(_NOT_COPIED)
        or name.startswith(".")
        or name in (INDEX, "config.json", "quantization_report.json")
    )
