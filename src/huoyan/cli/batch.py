"""`huoyan batch`: many requests from a file to a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from huoyan.cli.options import (
    DeviceOption,
    DtypeOption,
    EngineOption,
    ExecutorOption,
    GpuMemoryOption,
    HubOption,
    KVCacheDtypeOption,
    MaxModelLenOption,
    ModelOption,
    PipelineParallelOption,
    RevisionOption,
    SpeculativeNgramOption,
    TensorParallelOption,
    speculative_config,
)

if TYPE_CHECKING:
    from huoyan.api.batch.run import BatchProgress


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One request a line.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="One result a line, in the same order.")
    ],
    model: ModelOption = None,
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    engine: EngineOption = "native",
    tensor_parallel_size: TensorParallelOption = 1,
    pipeline_parallel_size: PipelineParallelOption = 1,
    distributed_executor_backend: ExecutorOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    speculative_ngram: SpeculativeNgramOption = None,
    gpu_memory: GpuMemoryOption = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="Requests that run side by side.")
    ] = 64,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of an answer, where a row does not say.")
    ] = 1024,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Where a row does not say; the default is greedy.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Where a row does not say.")] = None,
) -> None:
    """Answer every line of a file; run the same command again to go on after it was stopped.

    A line is OpenAI's batch format {"custom_id", "method", "url", "body"} or

    {"id": "a", "image": "a.jpg", "prompt": "what?", "params": {"max_tokens": 64}}

    with "images", "video", "videos", "frames", "question", "system" as well.
    Paths are relative to IN.jsonl.

    OUT.jsonl gets one line a row, in the same order, with "error" where the row
    failed. It is only appended to: a killed run loses nothing that was written,
    and the next one goes on behind it.
    """
    from huoyan.api.batch.rows import RowReader
    from huoyan.api.batch.run import BatchRun
    from huoyan.cli.models_option import model_name, open_llm

    given = {"temperature": temperature, "seed": seed}
    defaults: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}
    defaults |= {name: value for name, value in given.items() if value is not None}
    start = time.monotonic()
    with _Bar() as bar:
        run = BatchRun(
            source,
            target,
            RowReader(source.absolute().parent, defaults),
            model=model_name(model),
            ahead=max(64, 8 * concurrency),
            on_progress=bar.show,
        )
        try:
            if run.remaining:
                llm = open_llm(
                    model, hub=hub, revision=revision, device=device, dtype=dtype,
                    max_model_len=max_model_len, max_num_seqs=concurrency, engine=engine, gpu_memory=gpu_memory,
                    tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size,
                    distributed_executor_backend=distributed_executor_backend,
                    kv_cache_dtype=kv_cache_dtype, speculative_config=speculative_config(speculative_ngram),
                )  # fmt: skip
                start = time.monotonic()
                run.run(lambda jobs: llm.run_jobs(jobs, concurrency=concurrency, streamed=False))
        finally:
            run.close()
    print(_summary(run.progress, time.monotonic() - start), file=sys.stderr)


def _summary(progress: BatchProgress, seconds: float) -> str:
    parts = [f"{progress.answered} answered"]
    if progress.failed:
        parts.append(f'{progress.failed} failed (see their "error")')
    if progress.skipped:
        parts.append(f"{progress.skipped} were there already")
    if progress.answered:
        parts.append(f"{progress.completion_tokens / max(seconds, 1e-6):.0f} tokens/s")
    return f"{progress.written} of {progress.total} rows: {', '.join(parts)}"


class _Bar:
    """Rows and tokens a second, on a terminal only."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._start = time.monotonic()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, progress: BatchProgress) -> None:
        if not sys.stderr.isatty():
            return
        if self._progress is None:
            self._open(progress)
        seconds = max(time.monotonic() - self._start, 1e-6)
        self._progress.update(
            self._task,
            completed=progress.written,
            speed=f"{progress.completion_tokens / seconds:,.0f} tok/s"
            + (f", {progress.failed} failed" if progress.failed else ""),
        )

    def _open(self, progress: BatchProgress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
            console=Console(stderr=True),
        )
        self._progress.start()
        self._task = self._progress.add_task("rows", total=progress.total, speed="")
        self._start = time.monotonic()
