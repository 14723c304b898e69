"""`huoyan quantize` from one folder to another, and what it says."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from tests.cli.conftest import Command, start


def lines(folder: Path) -> Path:
    path = folder / "calibration.jsonl"
    rows = [{"question": f"what is {i}?", "answer": "a number"} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_report_and_a_model_that_loads(
    huoyan: Command, checkpoint: Path, red: Path, tmp_path: Path
) -> None:
    out = tmp_path / "int4"
    done = huoyan("quantize", checkpoint, out, "--group-size", 32, "--calibration", lines(tmp_path))
    assert done.code == 0
    for word in ("layer", "error", "perplexity", "agreement", "size", "time", f"--model {out}"):
        assert word in done.out
    assert done.err == ""
    asked = huoyan("ask", red, "what is this?", "--model", out, "--max-tokens", 4, "--json")
    assert asked.code == 0
    assert json.loads(asked.out)["completion_tokens"] <= 4


def test_json(huoyan: Command, checkpoint: Path, tmp_path: Path) -> None:
    common = ("--group-size", 32, "--calibration", lines(tmp_path), "--method", "rtn", "--json")
    done = huoyan("quantize", checkpoint, tmp_path / "a", *common, "--modules", "gate_up,down")
    report = json.loads(done.out)
    assert report["folder"] == str(tmp_path / "a")
    assert report["bytes_after"] < report["bytes_before"]
    assert 0 <= report["agreement"] <= 1
    assert {"layer", "relative_error", "seconds"} <= report["layers"][0].keys()


def test_errors_are_one_line(huoyan: Command, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((tmp_path / "nothing", tmp_path / "x"), 3, "no folder"),
        ((checkpoint, tmp_path / "x", "--bits", 8), 2, "bits 8"),
        ((checkpoint, tmp_path / "x", "--method", "gptq"), 2, "awq or rtn"),
        ((checkpoint, tmp_path / "x", "--modules", "head"), 2, "qkv, o, gate_up, down"),
        ((checkpoint, tmp_path / "x", "--quantize-head", "fp8"), 2, "int8, or none"),
        ((checkpoint, tmp_path / "x", "--group-size", 48), 2, "32, 64, 128"),
        ((checkpoint, tmp_path / "x", "--calibration", tmp_path / "no"), 2, "does not exist"),
        ((checkpoint, tmp_path / "there", "--group-size", 32), 2, "exists already"),
        ((checkpoint,), 2, "OUT"),
    ]
    for arguments, code, words in cases:
        done = huoyan("quantize", *arguments)
        assert (done.code, done.err.count("\n"), done.out) == (code, 1, ""), done.err
        assert words in done.err
    assert not (tmp_path / "x").exists()


def test_a_killed_run_leaves_nothing_that_looks_whole(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "int4"
    process = start("quantize", checkpoint, out, "--group-size", 32, "--calibration", lines(tmp_path))
    partial = tmp_path / "int4.partial"
    deadline = time.monotonic() + 90
    while not list(partial.glob("layer-*.safetensors")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert not (partial / "config.json").exists()
