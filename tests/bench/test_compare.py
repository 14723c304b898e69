"""`huoyan bench compare` on the embedded model and its int4 form, and what its proofs do when they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from huoyan.bench import compare
from huoyan.bench.opened import opened
from huoyan.bench.requests import Requests
from huoyan.bench.seats import seats_for
from huoyan.errors import CapacityError
from tests.cli.conftest import Command, checkpoint, huoyan

__all__ = ["checkpoint", "huoyan"]
TINY = Path(compare.__file__).parents[1] / "tiny" / "checkpoint"
SMALL = ("--gpu-memory", "192MiB", "--max-num-seqs", 4, "--max-tokens", 6, "--repeats", 1)


@pytest.mark.skipif(not TINY.is_dir(), reason="the embedded model is not in this checkout")
def test_tiny_against_tiny_int4(huoyan: Command, red: Path, tmp_path: Path) -> None:
    file = tmp_path / "compare.json"
    done = huoyan(
        "bench", "compare", "tiny", "tiny-int4", *SMALL, "--max-model-len", 256, "--batch-length", 64,
        "--picture", red, "--markdown", "--json", file,
    )  # fmt: skip
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "|  | tiny | tiny-int4 |"
    assert all(line.count("|") == 4 for line in lines if line.startswith("|"))
    report: dict[str, Any] = json.loads(file.read_text())
    dense, int4 = report["models"]
    assert int4["model_bytes"] < 0.8 * dense["model_bytes"]
    for column in (dense, int4):
        assert column["longest"] == {"asked": 256, "proved": 256, "limited_by": "max_model_len"}
        assert column["batch"] == {"asked": 4, "proved": 4, "limited_by": "max_num_seqs"}
        for asked in (column["beams"], column["greedy"]):
            assert 0 < asked["first_token_s"] <= asked["seconds"]
            assert 0 < asked["output_tokens"] <= 6
            # The picture's embeddings and the words around them.
            assert asked["input_tokens"] > 64


@pytest.mark.skipif(not TINY.is_dir(), reason="the embedded model is not in this checkout")
def test_a_run_that_was_cut_off_goes_on(
    huoyan: Command, red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell is there as soon as it is measured, and is not measured again."""
    file = tmp_path / "compare.json"
    command = (
        "bench", "compare", "tiny", "tiny-int4", *SMALL, "--max-model-len", 256, "--batch-length", 64,
        "--picture", red, "--json", file, "--resume", "--small-kv", "int8",
    )  # fmt: skip
    measured: list[str] = []
    batch, longest = compare._batch, compare._longest

    def cut(*given: Any) -> Any:
        measured.append("batch")
        raise KeyboardInterrupt

    def counted(*given: Any) -> Any:
        measured.append("longest")
        return longest(*given)

    monkeypatch.setattr(compare, "_longest", counted)
    monkeypatch.setattr(compare, "_batch", cut)
    assert huoyan(*command).code != 0
    first = json.loads(file.read_text())["models"]
    assert first[0].keys() >= {"model", "model_bytes", "beams", "greedy", "longest"}
    assert "batch" not in first[0]
    assert first[1] == {}
    monkeypatch.setattr(compare, "_batch", batch)
    done = huoyan(*command)
    assert done.code == 0, done.err
    assert measured == ["longest", "batch", "longest"]
    second = json.loads(file.read_text())["models"]
    assert {name: second[0][name] for name in first[0]} == first[0]
    assert all(column["small"]["batch"]["proved"] == 4 for column in second)
    monkeypatch.setattr(compare, "opened", None)
    again = huoyan(*command)
    assert (again.code, again.out) == (0, done.out), "nothing is left to measure"
    other = huoyan(*command, "--beams", 4)
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "another question" in other.err


@pytest.fixture
def red(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "red.png"
    Image.new("RGB", (100, 80), "red").save(path)
    return path


def test_what_memory_holds_is_run(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool ends both, and holds what is said: two MiB of 16 KiB blocks."""
    monkeypatch.setenv("HUOYAN_CPU_KV_MB", "2")
    with opened(str(checkpoint), max_num_batched_tokens=256) as loaded:
        llm = loaded.llm()
        assert loaded.engine.size.num_blocks == 128
        assert compare._longest(loaded, llm, Requests(0)) == compare.Most(2048, 2048, "the memory")
        assert compare._batch(loaded, llm, Requests(0), 470) == compare.Most(4, 4, "the memory")


def test_proofs_step_down_until_something_runs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(str(checkpoint), max_num_seqs=32, max_model_len=400) as loaded:
        llm = loaded.llm()
        finished = compare._finished

        def only_short(llm: Any, jobs: Any) -> dict[str, int]:
            if len(jobs[0].prompt.token_ids) > 300:
                raise CapacityError("out of memory")
            return finished(llm, jobs)

        monkeypatch.setattr(compare, "_finished", only_short)
        longest = compare._longest(loaded, llm, Requests(0))
        assert longest.asked == 400
        assert longest.proved == 400 * 7 // 8 * 7 // 8
        assert longest.limited_by == "the memory"
        monkeypatch.setattr(compare, "_most_at_once", lambda loaded, llm, jobs: min(len(jobs), 9))
        batch = compare._batch(loaded, llm, Requests(0), 32)
        assert batch == compare.Most(32, 9, "the memory")


def test_seats_are_what_the_memory_holds() -> None:
    options: dict[str, Any] = {"gpu_memory": "300MiB", "device": "cpu", "max_model_len": 2048}
    assert seats_for("small", 64, {**options, "max_num_seqs": 5})["max_num_seqs"] == 5
    assert seats_for("small", 64, {"device": "cpu"})["max_num_seqs"] == 256, "nothing was told"
    seats = seats_for("small", 64, options)["max_num_seqs"]
    assert seats % 16 == 0
    with opened("small", **options, max_num_seqs=seats) as loaded:
        held = loaded.engine.size.num_blocks // 4
        assert seats - 16 <= held <= seats


def test_all_at_once_is_seen(checkpoint: Path) -> None:
    """Three places for five requests: five never run together, and that shows."""
    with opened(str(checkpoint), max_num_seqs=3, max_model_len=256) as loaded:
        requests = Requests(0)
        jobs = [requests.words(20, compare.params(8)) for _ in range(5)]
        assert compare._most_at_once(loaded, loaded.llm(), jobs) == 3


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from huoyan.bench.plot import draw

    asked = compare.Asked(100, 20, 2.0, 0.5, "a plane")
    column = compare.Column("tiny", asked, asked, 10**9, "counted", None, *[compare.Most(8, 8, "x")] * 2)
    draw([column, column], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    huge = compare.markdown_table([column], compare.Question(None, 3, 9, 64, 1, 0))  # type: ignore[arg-type]
    assert "| beam 3: input | 50.0 tok/s |" in huge


def test_errors_are_one_line(huoyan: Command, tmp_path: Path) -> None:
    done = huoyan("bench", "compare", tmp_path / "a", tmp_path / "b")
    assert (done.code, done.err.count("\n"), done.out) == (3, 1, "")
    done = huoyan("bench", "compare", "tiny", "tiny-int4", "--picture", tmp_path / "none.png")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "none.png" in done.err
    # A second model that is not there is told before the first is measured.
    done = huoyan("bench", "compare", "tiny", tmp_path / "b")
    assert (done.code, done.err.count("\n"), done.out) == (3, 1, "")
