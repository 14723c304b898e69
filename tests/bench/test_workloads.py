"""`huoyan bench` on a small random checkpoint: what each workload prints and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command, checkpoint, huoyan

__all__ = ["checkpoint", "huoyan"]
SIZE = "60x40"
CASES: dict[str, tuple[tuple[object, ...], set[str], int]] = {
    "latency": (
        ("--input", "5,9", "--batch", "1,2", "--output", 4, "--warmup", 0, "--repeats", 1),
        {"first_token_ms", "inter_token_ms", "inter_token_p99_ms", "tokens_per_s"},
        4,
    ),
    "throughput": (
        ("--requests", 3, "--picture", SIZE, "--output", 3, "--warmup", 0, "--repeats", 1),
        {"first_token_ms", "answer_s", "answer_p99_s", "tokens_per_s", "requests_per_s"},
        1,
    ),
    "pictures": (
        ("--sizes", f"{SIZE},{SIZE}*2", "--warmup", 0, "--repeats", 1),
        {"first_token_ms", "first_token_p99_ms"},
        2,
    ),
    "beams": (
        ("--picture", SIZE, "--output", 4, "--warmup", 0, "--repeats", 1),
        {"first_token_ms", "step_ms", "step_p99_ms", "answer_s"},
        2,
    ),
    "video": (
        ("--frames", "2,17", "--size", "30x20", "--warmup", 0, "--repeats", 1),
        {"first_token_ms", "first_token_p99_ms"},
        2,
    ),
    "serve": (
        ("--rate", 200, "--requests", 5, "--sizes", f"none,{SIZE}", "--output", 4),
        {"first_token_ms", "first_token_p99_ms", "inter_token_ms", "inter_token_p99_ms"},
        3,
    ),
}


@pytest.mark.parametrize("workload", CASES)
def test_rows_and_json(huoyan: Command, checkpoint: Path, tmp_path: Path, workload: str) -> None:
    arguments, measures, count = CASES[workload]
    file = tmp_path / "report.json"
    done = huoyan(
        "bench", workload, "--model", checkpoint, *arguments, "--max-model-len", 2048, "--json", file
    )
    assert done.code == 0, done.err
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["workload"] == workload
    assert report["model"]["name"] == str(checkpoint)
    assert report["model"]["max_model_len"] == 2048
    assert report["machine"]["matvec_bytes_per_s"] > 0
    assert len(report["rows"]) == count
    for row in report["rows"]:
        assert measures <= row["measured"].keys()
        assert all(value > 0 for value in (*row["measured"].values(), *row["limits"].values()))
        assert row["limits"].keys() <= row["measured"].keys()
        assert row["name"] in done.out
    assert "GB/s" in done.out
    assert "limit" in done.out
    assert "\x1b" not in done.out


def test_tokens_are_counted(huoyan: Command, checkpoint: Path, tmp_path: Path) -> None:
    """Rates are held against the times in the same report."""
    file = tmp_path / "report.json"
    common = ("--warmup", 0, "--repeats", 1, "--json", file)
    huoyan("bench", "throughput", "--model", checkpoint, "--requests", 4, "--picture", "none", "--words", 7,
           "--output", 5, *common)  # fmt: skip
    (row,) = json.loads(file.read_text())["rows"]
    assert row["name"] == "4 x 7 tokens"
    assert row["measured"]["tokens_per_s"] == pytest.approx(5 * row["measured"]["requests_per_s"])
    assert row["limits"]["tokens_per_s"] == pytest.approx(5 * row["limits"]["requests_per_s"])


def test_random_weights_of_a_named_shape(huoyan: Command, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    common = ("--input", 4, "--output", 3, "--warmup", 0, "--repeats", 1, "--max-model-len", 64)
    assert huoyan("bench", "latency", "--model", "small-int4", *common, "--json", file).code == 0
    report = json.loads(file.read_text())
    assert report["model"]["int4_group_size"] == 128
    assert report["rows"][0]["measured"]["tokens_per_s"] > 0


def test_dummy_reads_no_weights(huoyan: Command, checkpoint: Path, tmp_path: Path) -> None:
    """A folder without its weight files is enough."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in checkpoint.iterdir():
        if "safetensors" not in path.name:
            (bare / path.name).symlink_to(path)
    common = ("--input", 4, "--output", 3, "--warmup", 0, "--repeats", 1, "--max-model-len", 64)
    assert huoyan("bench", "latency", "--model", bare, *common).code == 3
    assert huoyan("bench", "latency", "--model", bare, *common, "--load-format", "dummy").code == 0


def test_errors_are_one_line(huoyan: Command, checkpoint: Path, tmp_path: Path) -> None:
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("latency", "--model", tmp_path / "none"), 3, "no folder"),
        (("latency", "--model", checkpoint, "--batch", "many"), 2, "--batch"),
        (("pictures", "--model", checkpoint, "--sizes", "big"), 2, "no size of pictures"),
        (("video", "--model", checkpoint, "--size", "8x8*2"), 2, "--size"),
        (("serve", "--model", checkpoint, "--rate", 0), 2, "--rate"),
        (("latency", "--model", checkpoint, "--input", 5000, "--output", 2), 2, "5000"),
        (("latencies",), 2, "latencies"),
    ]
    for arguments, code, words in cases:
        done = huoyan("bench", *arguments)
        assert done.code == code, done.err
        assert words in done.err
        assert [line for line in done.err.splitlines() if "huoyan: " in line] == [done.err.splitlines()[-1]]


def test_sizes_that_are_too_large_for_this_machine(huoyan: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding and the head count each: 8.1 billion values."""
    monkeypatch.setattr("huoyan.engine.sizing.total_memory", lambda: 30 << 30)
    done = huoyan("bench", "latency", "--model", "minicpm-v-2_6", "--device", "cpu")
    assert (done.code, done.err.count("\n")) == (4, 1)
    assert "takes 30.2 GiB of random weights in float32 and this machine has 30.0 GiB" in done.err
