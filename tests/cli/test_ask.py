"""`huoyan ask` with random weights: what goes in, what comes out, what is said about mistakes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import wave
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from huoyan.cli.question import split_arguments
from huoyan.errors import InputError
from tests.cli.conftest import Command, start


def test_an_answer_is_printed_alone(huoyan: Command, checkpoint: Path, red: Path) -> None:
    done = huoyan("ask", red, "what colour?", "--model", checkpoint, "--max-tokens", 6)
    assert done.code == 0, done.err
    assert done.out.endswith("\n")
    assert done.err == ""
    again = huoyan("ask", red, "what colour?", "-m", checkpoint, "--max-tokens", 6, "--json")
    report = json.loads(again.out)
    assert report["answer"] + "\n" == done.out
    assert report["completion_tokens"] == 6
    assert report["finish_reason"] == "length"
    assert report["prompt_tokens"] > 64
    assert report["time_to_first_token"] > 0
    assert report["tokens_per_second"] > 0


def test_several_pictures_and_standard_input(
    huoyan: Command, checkpoint: Path, red: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-m", checkpoint, "--max-tokens", 2, "--json")
    one = json.loads(huoyan("ask", red, "what?", *options).out)
    two = json.loads(huoyan("ask", red, red, "what?", *options).out)
    assert two["prompt_tokens"] - one["prompt_tokens"] >= 64
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(red.read_bytes())))
    assert json.loads(huoyan("ask", "-", "what?", *options).out)["answer"] == one["answer"]
    none = json.loads(huoyan("ask", "what?", *options).out)
    assert one["prompt_tokens"] - none["prompt_tokens"] >= 64


def test_parameters_reach_the_engine(huoyan: Command, checkpoint: Path, red: Path) -> None:
    def answer(*options: object) -> str:
        done = huoyan("ask", red, "what?", "-m", checkpoint, "--max-tokens", 12, *options)
        assert done.code == 0, done.err
        return done.out

    sampled = [answer("--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1]
    assert sampled[0] != sampled[2]
    assert answer("--system", "be brief") != answer("--system", "be long, very long")
    assert answer("--top-k", 1) == answer()
    assert answer("--speculative-ngram", 3) == answer()
    assert answer("--kv-cache-dtype", "int8")
    wrong = huoyan("ask", red, "what?", "-m", checkpoint, "--kv-cache-dtype", "int4")
    assert "use auto, int8, fp8" in wrong.err
    assert wrong.code == 2


def test_beams_give_an_answer(huoyan: Command, checkpoint: Path, red: Path) -> None:
    done = huoyan("ask", red, "what?", "-m", checkpoint, "--max-tokens", 5, "--beam", 3)
    assert done.code == 0, done.err
    assert done.out.strip()
    refused = huoyan("ask", red, "what?", "-m", checkpoint, "--beam", 3, "--top-p", 0.5)
    assert refused.code == 2
    assert "--top-p" in refused.err


def test_slices_can_be_limited(huoyan: Command, checkpoint: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (1344, 896), "blue").save(tmp_path / "large.png")
    sizes = [
        json.loads(
            huoyan(
                "ask", tmp_path / "large.png", "?", "-m", checkpoint, "--max-tokens", 1, "--json", *more
            ).out
        )["prompt_tokens"]
        for more in ((), ("--max-slices", 1))
    ]
    assert sizes[0] - sizes[1] > 5 * 64


def write_sound(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    return path


def test_standard_input_may_be_empty(
    huoyan: Command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    done = huoyan("ask", "-", "what?", "-m", checkpoint)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "standard input is empty" in done.err


def test_more_tokens_than_there_is_room_for_end_at_the_context(
    huoyan: Command, checkpoint: Path, red: Path
) -> None:
    done = huoyan(
        "ask", red, "what?", "-m", checkpoint, "--max-tokens", 10**9, "--max-model-len", 160, "--json"
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["prompt_tokens"] + report["completion_tokens"] <= 160


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_here_is_one_line(huoyan: Command, checkpoint: Path, red: Path) -> None:
    done = huoyan("ask", red, "what?", "-m", checkpoint, "--device", "cuda")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--device cpu" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{red}"], 2, "the question is missing"),
        (["missing.png"], 2, "the question is missing"),
        (["{red}", "-"], 2, "the question is missing"),
        (["{red}", ""], 2, "question is empty"),
        (["missing.png", "what?"], 2, "there is no picture 'missing.png'"),
        (["{red}", "what", "is", "this"], 2, "in quotes"),
        (["{folder}", "what?"], 2, "is a folder"),
        (["--video", "{text}", "what?"], 2, "not a video"),
        (["--video", "{sound}", "what?"], 2, "only sound"),
        (["-", "-", "what?"], 2, "once"),
        (["--video", "none.mp4", "what?"], 2, "there is no video 'none.mp4'"),
        ([], 2, "Missing argument"),
        (["{red}", "what?", "--nonsense"], 2, "No such option"),
        (["{red}", "what?", "--max-tokens", "0"], 2, "max-tokens"),
        (["{red}", "what?", "--temperature", "-1"], 2, "temperature"),
        (["{red}", "what?", "--device", "gpu"], 2, "device 'gpu' is unknown"),
        (["{red}", "what?", "--dtype", "int3"], 2, "dtype 'int3'"),
        (["{red}", "what?", "--max-model-len", "70"], 2, "70"),
        (["{text}", "what?"], 2, "text.png"),
    ],
)
def test_mistakes_are_one_line(
    huoyan: Command, checkpoint: Path, red: Path, arguments: list[str], code: int, words: str
) -> None:
    text = red.parent / "text.png"
    text.write_text("not a picture")
    sound = write_sound(red.parent / "sound.wav")
    places = {"red": red, "text": text, "folder": red.parent, "sound": sound}
    filled = [argument.format(**places) for argument in arguments]
    done = huoyan("ask", *filled, "--model", checkpoint)
    assert done.code == code
    assert words in done.err
    assert done.err.startswith("huoyan: ")
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_missing_models_are_explained(
    huoyan: Command, red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HUOYAN_MODEL", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = huoyan("ask", red, "what?")
    assert done.code == 3
    assert "openbmb/MiniCPM-V-2_6" in done.err
    assert "--model tiny" in done.err
    monkeypatch.setenv("HUOYAN_MODEL", "no/such-model")
    assert "no/such-model" in huoyan("ask", red, "what?").err
    assert "no folder" in huoyan("ask", red, "what?", "-m", "./nowhere").err
    empty = huoyan("ask", red, "what?", "-m", tmp_path)
    assert empty.code == 3
    assert "holds no checkpoint" in empty.err


def test_debugging_shows_where(
    huoyan: Command, red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUOYAN_DEBUG", "1")
    with pytest.raises(Exception, match="config"):
        huoyan("ask", red, "what?", "-m", tmp_path)


def test_words_are_told_from_pictures(red: Path) -> None:
    assert split_arguments([str(red), "http://x/a.png", "data:image/png;base64,AA", "why?"], []) == (
        [str(red), "http://x/a.png", "data:image/png;base64,AA"],
        "why?",
    )
    assert split_arguments(["这是什么"], []) == ([], "这是什么")
    assert split_arguments([str(red), "is this a .png or a .jpg?"], [])[1] == "is this a .png or a .jpg?"
    with pytest.raises(InputError, match="missing"):
        split_arguments(["http://x/a.png"], [])


@pytest.mark.slow
def test_ctrl_c_is_quiet_and_a_closed_pipe_too(checkpoint: Path, red: Path) -> None:
    import signal

    arguments = ("ask", red, "what?", "-m", checkpoint, "--max-tokens", 3500, "--temperature", 2, "--seed", 1)
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == b""

    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() in (1, 128 + signal.SIGPIPE)
    assert process.stderr.read() == b""


@pytest.mark.skipif(not hasattr(__import__("os"), "openpty"), reason="needs a terminal")
def test_a_terminal_is_told_how_fast_it_went(checkpoint: Path, red: Path) -> None:
    import os

    keeper, terminal = os.openpty()
    arguments = ("ask", red, "what?", "-m", checkpoint, "--max-tokens", 4)
    process = start(*arguments, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    assert process.stdout is not None
    answer = process.stdout.read().decode()
    assert process.wait(30) == 0
    said = os.read(keeper, 4096).decode()
    os.close(keeper)
    assert answer.count("\n") >= 1
    assert "tokens in, 4 out" in said
    assert "tokens/s" in said
    assert "cut off by --max-tokens" in said
