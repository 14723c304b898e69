"""Tensors of a checkpoint by name, memory-mapped, with few files open at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from huoyan.errors import ModelError
from huoyan.models.safetensors_header import TensorInfo

_OPEN_FILES = 2


class TensorReader:
    """Use as a context manager. Closing a file gives its pages back, so that memory stays near one shard."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._open: OrderedDict[Path, tuple[AbstractContextManager[Any], Any]] = OrderedDict()
        self.bytes_read = 0

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1][0].__exit__(None, None, None)

    def read(self, name: str) -> Tensor:
        """A view of the file's bytes on the CPU: copy what must outlive the reader."""
        info = self._tensors[name]
        self.bytes_read += info.nbytes
        try:
            value = self._file(info.file).get_tensor(name)
        except OSError as error:
            raise ModelError(f"{info.file} cannot be read: {error}") from None
        assert isinstance(value, Tensor)
        return value

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            from safetensors import safe_open

            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1][0].__exit__(None, None, None)
            manager: AbstractContextManager[Any] = safe_open(path, framework="pt", device="cpu")
            self._open[path] = (manager, manager.__enter__())
        self._open.move_to_end(path)
        return self._open[path][1]
