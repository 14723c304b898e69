"""Run a file of rows: read ahead, answer side by side, write in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huoyan.api.batch.results import ResultFile
from huoyan.api.batch.rows import Row, RowReader
from huoyan.api.driver import Job
from huoyan.api.openai_format import chat_completion, error_body
from huoyan.api.outputs import RequestOutput
from huoyan.api.prompts import ChatPrompt
from huoyan.errors import HuoyanError, InputError

Run = Callable[[Iterable[Job | None]], Iterator[RequestOutput]]
"""Runs jobs side by side: `LLM.run_jobs`."""


@dataclass
class BatchProgress:
    """Counts of rows and tokens so far; `skipped` were there from an earlier run."""

    total: int
    skipped: int = 0
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def written(self) -> int:
        return self.skipped + self.answered + self.failed


class BatchRun:
    """Reads `source`, appends to `target`, row by row in the same order.

    A row that cannot be run gets a line with its error. A row is in the output once, however often the run is
    stopped and started again.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        reader: RowReader,
        *,
        model: str,
        ahead: int,
        on_progress: Callable[[BatchProgress], None] | None = None,
    ) -> None:
        """`ahead`: rows that may be answered before the oldest one is, and wait for it in memory.

        Raises:
            InputError: the input is missing, or the output belongs to another input.
        """
        self._source = source
        self._reader = reader
        self._model = model
        self._ahead = ahead
        self._on_progress = on_progress or (lambda progress: None)
        if not source.is_file():
            what = "is a folder" if source.is_dir() else "is not there"
            raise InputError(f"the input {source} {what}: give a file of one JSON object a line")
        if target.exists() and target.samefile(source):
            raise InputError("the output must not be the input: give another file")
        self._results = ResultFile(target)
        try:
            self.progress = BatchProgress(total=_check_ids(source, self._results.ids, target))
        except BaseException:
            self._results.close()
            raise
        self.progress.skipped = self._results.done
        self._next = self._results.done
        self._rows: dict[str, Row] = {}
        self._finished: dict[int, dict[str, Any]] = {}

    @property
    def remaining(self) -> int:
        """Rows that have no line yet."""
        return self.progress.total - self.progress.written

    def run(self, run: Run) -> BatchProgress:
        """Answer what is left."""
        try:
            for output in run(self._jobs()):
                if output.finished:
                    self._take(output)
            self._write()
        finally:
            self._results.close()
        return self.progress

    def close(self) -> None:
        """Leave the output as it is."""
        self._results.close()

    def _jobs(self) -> Iterator[Job | None]:
        for number, line in _lines(self._source):
            if number < self._results.done:
                continue
            while number - self._next >= self._ahead:
                yield None
            row = self._reader.read(number, line)
            if row.error is not None:
                self._fail(row, row.error)
                self._write()
                continue
            request_id = f"row-{number}"
            self._rows[request_id] = row
            try:
                prompt = ChatPrompt(messages=row.messages, **row.options)
            except TypeError as error:
                self._fail(self._rows.pop(request_id), InputError(str(error)))
                continue
            yield Job(request_id, prompt, row.params)

    def _take(self, output: RequestOutput) -> None:
        row = self._rows.pop(output.request_id)
        if output.error is not None:
            self._fail(row, InputError(output.error))
        else:
            self.progress.answered += 1
            self.progress.prompt_tokens += len(output.prompt_token_ids)
            self.progress.completion_tokens += sum(len(answer.token_ids) for answer in output.outputs)
            self._finished[row.number] = _answer_record(row, output, self._model)
        self._write()

    def _fail(self, row: Row, error: HuoyanError) -> None:
        self.progress.failed += 1
        self._finished[row.number] = _error_record(row, error)

    def _write(self) -> None:
        """Append what has become next in line."""
        while (record := self._finished.pop(self._next, None)) is not None:
            self._results.append(record)
            self._next += 1
        self._on_progress(self.progress)


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """The rows of a file, numbered; blank lines are none."""
    number = 0
    with source.open("rb") as file:
        for index, line in enumerate(file):
            if index == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line
                number += 1


def _check_ids(source: Path, ids: list[Any], target: Path) -> int:
    """Count the rows, and hold the finished ones against the output's lines."""
    import json

    from huoyan.api.batch.rows import row_id

    count = 0
    for number, line in _lines(source):
        count += 1
        if number >= len(ids):
            continue
        try:
            value = json.loads(line)
            expected = row_id(value) if isinstance(value, dict) else None
        except ValueError:
            expected = None
        if expected != ids[number]:
            raise InputError(
                f"row {number + 1} of {source} is {expected!r} and of {target} {ids[number]!r}: the output "
                "belongs to another input; choose another file, or remove it to start over"
            )
    if len(ids) > count:
        raise InputError(
            f"{target} has {len(ids)} lines and {source} {count} rows: it belongs to another input"
        )
    return count


def _answer_record(row: Row, output: RequestOutput, model: str) -> dict[str, Any]:
    if row.style == "openai":
        body = chat_completion(output, model, int(time.time()))
        response = {"status_code": 200, "request_id": output.request_id, "body": body}
        return {"id": f"batch-{row.number}", "custom_id": row.id, "response": response, "error": None}
    answers = [answer.text for answer in output.outputs]
    record: dict[str, Any] = {"id": row.id, "answer": answers[0] if answers else ""}
    if len(answers) > 1:
        record["answers"] = answers
    record["finish_reason"] = output.outputs[0].finish_reason if output.outputs else None
    record["prompt_tokens"] = len(output.prompt_token_ids)
    record["completion_tokens"] = sum(len(answer.token_ids) for answer in output.outputs)
    return record


def _error_record(row: Row, error: HuoyanError) -> dict[str, Any]:
    if row.style == "openai":
        response = {"status_code": error.http_status, "request_id": None, "body": error_body(error)}
        problem = {"code": "invalid_request", "message": str(error)}
        return {"id": f"batch-{row.number}", "custom_id": row.id, "response": response, "error": problem}
    return {"id": row.id, "error": {"message": str(error), "row": row.number + 1}}
