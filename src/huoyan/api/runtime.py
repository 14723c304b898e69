"""A loaded model: the stages of a request in one object, shared by `LLM` and `AsyncLLM`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from huoyan.api.frontend import Frontend
    from huoyan.api.options import EngineOptions
    from huoyan.backends.base import Backend


@dataclass
class Runtime:
    """`backend` belongs to one thread at a time; `frontend` may be used by several."""

    backend: Backend
    frontend: Frontend
    folder: Path
    options: EngineOptions
