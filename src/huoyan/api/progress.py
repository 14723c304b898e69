"""The bar of `LLM.generate`: only on a terminal, with tokens a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from huoyan.api.outputs import RequestOutput


class RequestBar:
    """Counts finished requests and tokens. `wanted` is vLLM's `use_tqdm`: a bool, or a tqdm-like class."""

    def __init__(self, total: int, wanted: bool | Callable[..., Any]) -> None:
        self._start = time.monotonic()
        self._prompt_tokens = 0
        self._tokens: dict[str, int] = {}
        self._custom: Any = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if callable(wanted):
            self._custom = wanted(total=total, desc="Processed prompts")
        elif wanted and sys.stderr.isatty():
            self._progress, self._task = _rich_bar(total)

    @property
    def counts_tokens(self) -> bool:
        """Whether it wants the outputs of every step, not only the last of each request."""
        return self._progress is not None

    def update(self, output: RequestOutput) -> None:
        """Take the newest output of a request."""
        if self._progress is None and self._custom is None:
            return
        self._tokens[output.request_id] = sum(len(answer.token_ids) for answer in output.outputs)
        if output.finished:
            self._prompt_tokens += len(output.prompt_token_ids)
        if self._custom is not None:
            if output.finished:
                self._custom.update(1)
            return
        if self._progress is not None and self._task is not None:
            seconds = max(time.monotonic() - self._start, 1e-6)
            self._progress.update(
                self._task,
                advance=1 if output.finished else 0,
                speed=f"in {self._prompt_tokens / seconds:,.0f} tok/s, "
                f"out {sum(self._tokens.values()) / seconds:,.0f} tok/s",
            )

    def __enter__(self) -> RequestBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._custom is not None:
            self._custom.close()
        if self._progress is not None:
            self._progress.stop()


def _rich_bar(total: int) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("Processed prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
        console=Console(stderr=True),
    )
    progress.start()
    return progress, progress.add_task("requests", total=total, speed="")
