"""`huoyan batch`: every row once, in order, however often it is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from huoyan.api.batch.results import ResultFile
from huoyan.api.batch.rows import RowReader
from huoyan.api.batch.run import BatchProgress, BatchRun
from huoyan.api.llm import LLM
from huoyan.errors import InputError
from tests.api.fakes import FakeBackend, fake_runtime

DEFAULTS = {"temperature": 0.0, "max_tokens": 50}
REPOSITORY = Path(__file__).parents[2]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join(
            (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
        ),
        encoding="utf-8",
    )
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_batch(source: Path, target: Path, concurrency: int = 4, **backend: Any) -> BatchProgress:
    llm = LLM.from_runtime(fake_runtime(FakeBackend(**backend)))
    batch = BatchRun(
        source, target, RowReader(source.parent, DEFAULTS), model="fake", ahead=max(16, 4 * concurrency)
    )
    return batch.run(lambda jobs: llm.run_jobs(jobs, concurrency=concurrency))


def test_rows_come_out_in_their_order(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [{"id": i, "prompt": " ".join([f"row{i}", *["w"] * rng.randrange(40)])} for i in range(200)]
    progress = run_batch(write_rows(tmp_path / "in", rows), tmp_path / "out", concurrency=8)
    written = read_rows(tmp_path / "out")
    assert [(row["id"], row["answer"]) for row in written] == [(row["id"], row["prompt"]) for row in rows]
    assert written[0].keys() == {"id", "answer", "finish_reason", "prompt_tokens", "completion_tokens"}
    assert (progress.total, progress.answered, progress.failed, progress.skipped) == (200, 200, 0, 0)


def test_failed_rows_have_one_error_line_each(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "fine"},
        "{not json",
        {"id": "b"},
        {"id": "c", "prompt": "wrong"},
        {"id": "d", "prompt": "x", "nonsense": 1},
        {"id": "e", "prompt": "x", "params": {"temperature": -1}},
        "[1, 2]",
        {"custom_id": "f", "body": {"messages": []}},
        {"custom_id": "g", "body": {"messages": [{"role": "user", "content": "wrong"}]}},
        {"custom_id": "h", "url": "/v1/embeddings", "body": {"messages": [{"role": "user", "content": "x"}]}},
        {"id": "i", "prompt": "also fine"},
    ]
    progress = run_batch(write_rows(tmp_path / "in", rows), tmp_path / "out")
    written = read_rows(tmp_path / "out")
    assert len(written) == len(rows)
    assert (progress.answered, progress.failed) == (2, 9)
    assert [row.get("answer") for row in written] == ["fine", *[None] * 9, "also fine"]
    assert [row.get("custom_id", row["id"]) for row in written] == [
        "a", None, "b", "c", "d", "e", None, "f", "g", "h", "i",
    ]  # fmt: skip
    assert "not JSON" in written[1]["error"]["message"]
    assert written[8]["error"]["message"].startswith("this prompt is wrong")
    assert written[8]["response"]["status_code"] == 400
    assert written[8]["response"]["body"]["error"]["type"] == "invalid_request_error"


def test_openais_format_both_ways(tmp_path: Path) -> None:
    (tmp_path / "in.d").mkdir()
    parts = [
        {"type": "text", "text": "what is"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "text", "text": "this"},
    ]
    row = {
        "custom_id": "request-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "x", "messages": [{"role": "user", "content": parts}], "max_tokens": 3},
    }
    run_batch(write_rows(tmp_path / "in", [row]), tmp_path / "out")
    (written,) = read_rows(tmp_path / "out")
    assert written["custom_id"] == "request-1"
    assert written["error"] is None
    body = written["response"]["body"]
    assert written["response"]["status_code"] == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    reader = RowReader(tmp_path, DEFAULTS)
    row = reader.read(0, json.dumps({"image": "a.jpg", "images": ["/b.jpg", "http://c"], "prompt": "q"}))
    sources = [part.get("image") for part in row.messages[0]["content"]]
    assert sources == [str(tmp_path / "a.jpg"), "/b.jpg", "http://c", None]
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "d.png"}}]}]}
    row = reader.read(0, json.dumps({"custom_id": 1, "body": body}))
    assert row.messages[0]["content"][0]["image_url"]["url"] == str(tmp_path / "d.png")


def test_rows_with_the_same_id_or_none_all_run(tmp_path: Path) -> None:
    rows = [{"id": "same", "prompt": f"p{i}"} for i in range(5)] + [{"prompt": "no id"}] * 2
    source = write_rows(tmp_path / "in", rows)
    run_batch(source, tmp_path / "out", fail_after=None)
    assert [row["answer"] for row in read_rows(tmp_path / "out")] == [f"p{i}" for i in range(5)] + [
        "no id"
    ] * 2


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b'\xef\xbb\xbf{"id": 1, "prompt": "a"}\n\n  \n{"id": 2, "prompt": "b"}')
    progress = run_batch(tmp_path / "in", tmp_path / "out")
    assert progress.total == 2
    assert [row["id"] for row in read_rows(tmp_path / "out")] == [1, 2]


def test_running_again_changes_nothing_and_added_rows_are_done(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"p{i}"} for i in range(5)]
    source = write_rows(tmp_path / "in", rows)
    run_batch(source, tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    assert run_batch(source, tmp_path / "out").skipped == 5
    assert (tmp_path / "out").read_bytes() == before
    write_rows(source, [*rows, {"id": 5, "prompt": "p5"}])
    assert run_batch(source, tmp_path / "out").answered == 1
    assert [row["id"] for row in read_rows(tmp_path / "out")] == list(range(6))


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_torn_last_line_is_done_again(tmp_path: Path, cut: int) -> None:
    rows = [{"id": i, "prompt": f"p{i}"} for i in range(5)]
    source = write_rows(tmp_path / "in", rows)
    run_batch(source, tmp_path / "out")
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(whole[:-cut])
    run_batch(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == whole
    (tmp_path / "out").write_bytes(whole + b"\0" * 100)
    run_batch(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == whole


def test_an_output_of_another_input_is_not_touched(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in", [{"id": i, "prompt": "p"} for i in range(3)])
    for content in (
        '{"id": 7, "answer": "x"}\n',
        '{"id": 0}\n{"id": 1}\n{"id": 2}\n{"id": 3}\n',
        'damaged\n{"id": 1}\n',
    ):
        (tmp_path / "out").write_text(content)
        with pytest.raises(InputError, match=r"another input|damaged"):
            run_batch(source, tmp_path / "out")
        assert (tmp_path / "out").read_text() == content


def test_wrong_files_are_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in", [{"id": 1, "prompt": "p"}])
    with pytest.raises(InputError, match="is not there"):
        run_batch(tmp_path / "none", tmp_path / "out")
    with pytest.raises(InputError, match="must not be the input"):
        run_batch(source, source)
    with pytest.raises(InputError, match="cannot write"):
        run_batch(source, tmp_path)


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    held = ResultFile(tmp_path / "out")
    with pytest.raises(InputError, match="another process"):
        ResultFile(tmp_path / "out")
    held.close()
    ResultFile(tmp_path / "out").close()


def test_a_failing_engine_keeps_what_was_written(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in", [{"id": i, "prompt": "p " * (1 + i)} for i in range(30)])
    with pytest.raises(RuntimeError):
        run_batch(source, tmp_path / "out", fail_after=12)
    done = len(read_rows(tmp_path / "out"))
    assert 0 < done < 30
    run_batch(source, tmp_path / "out")
    assert [row["id"] for row in read_rows(tmp_path / "out")] == list(range(30))


WORKER = """
import sys
from pathlib import Path
from tests.api.test_batch import run_batch
run_batch(Path(sys.argv[1]), Path(sys.argv[2]), step_seconds=0.001)
"""


def test_killed_twenty_times_every_row_is_there_once(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for i in range(3000):
        prompt = " ".join([f"row{i}", *["字"] * rng.randrange(6)])
        rows.append({"id": f"id{i % 700}", "prompt": "wrong " + prompt if i % 31 == 0 else prompt})
    source, target = write_rows(tmp_path / "in", rows), tmp_path / "out"
    command = [sys.executable, "-c", WORKER, str(source), str(target)]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}"}
    kills = landed = 0
    while kills < 20:
        before = target.stat().st_size if target.exists() else 0
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY)
        # Count from the first new line on, so that the kill lands in the middle of the writing.
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            if target.exists() and target.stat().st_size > before:
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        landed += process.wait() == -signal.SIGKILL
        kills += 1
    assert landed >= 10, "the kills came too late to test anything"
    partial = len(target.read_bytes().splitlines())
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, timeout=60)
    written = read_rows(target)
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    for row, result in zip(rows, written, strict=True):
        if row["prompt"].startswith("wrong"):
            assert "error" in result
        else:
            assert result["answer"] == row["prompt"]
    print(f"{landed} kills landed, the last one at row {partial} of {len(rows)}")
