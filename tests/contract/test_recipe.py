"""The recipe's three scripts, a batch file and the command, with vLLM: what they print is what the native engine
prints. The scripts' `LLM(...)` is the model that is open already."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import huoyan
from huoyan import LLM, SamplingParams
from tests.contract.conftest import MEDIA, Pair

RECIPE = Path(__file__).parents[2] / "examples" / "recipe"


def printed(
    script: str, llm: LLM, engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    asked: list[dict[str, Any]] = []

    def opened(model: str, **options: Any) -> LLM:
        asked.append(options)
        return llm

    monkeypatch.setattr(huoyan, "LLM", opened)
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setenv("ENGINE", engine)
    capsys.readouterr()
    runpy.run_path(str(RECIPE / script), run_name="__main__")
    assert [options["engine"] for options in asked] == [engine]
    return capsys.readouterr().out


@pytest.mark.parametrize("script", ["one_picture.py", "several_pictures.py"])
def test_the_scripts_that_search(
    pair: Pair, script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = printed(script, pair.native, "native", monkeypatch, capsys)
    vllm = printed(script, pair.vllm, "vllm", monkeypatch, capsys)
    assert native == vllm
    assert len(native) > 10


def test_the_script_that_samples(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The video's, without a seed: two engines draw differently, so only that it speaks of the car is the same."""
    for llm, engine in zip(pair.both, ("native", "vllm"), strict=True):
        assert "car" in printed("video.py", llm, engine, monkeypatch, capsys)


def test_a_batch_file(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huoyan.cli import models_option
    from huoyan.cli.main import run

    rows: list[dict[str, Any]] = [
        {"id": "plane", "image": str(MEDIA / "airplane.jpg"), "prompt": "What is in this picture?"},
        {"id": "none", "image": "no/such.png", "prompt": "what?"},
        {"id": "car", "video": str(MEDIA / "car.mp4"), "frames": 4, "prompt": "Please describe this video."},
        {"id": "beams", "image": str(MEDIA / "stars.jpg"), "prompt": "请描述这张图片",
         "params": {"use_beam_search": True, "best_of": 3, "temperature": 0, "max_tokens": 24}},
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answers = []
    for name, llm in (("native", pair.native), ("vllm", pair.vllm)):

        def opened(*_: Any, chosen: LLM = llm, expected: str = name, **options: Any) -> LLM:
            assert options["engine"] == expected
            return chosen

        monkeypatch.setattr(models_option, "open_llm", opened)
        target = tmp_path / f"{name}.jsonl"
        code = run(["batch", str(tmp_path / "in.jsonl"), str(target), "--engine", name, "--max-tokens", "24"])
        assert code == 0
        lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        answers.append([(line["id"], line.get("text"), line.get("error")) for line in lines])
    assert answers[0] == answers[1]
    assert [name for name, _, error in answers[1] if error] == ["none"]


def test_the_command_streams(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huoyan.cli import models_option
    from huoyan.cli.main import run

    monkeypatch.setattr(models_option, "open_llm", lambda *_, **__: pair.vllm)
    assert run(["ask", str(MEDIA / "airplane.jpg"), "What is in this picture?", "--engine", "vllm"]) == 0
    said = capsys.readouterr().out
    native = pair.native.ask(MEDIA / "airplane.jpg", "What is in this picture?", max_tokens=64)
    assert said == native + "\n"


def test_sampling_defaults_are_the_checkpoints(pair: Pair) -> None:
    native, vllm = (llm.get_default_sampling_params() for llm in pair.both)
    assert native == vllm
    assert isinstance(vllm, SamplingParams)
