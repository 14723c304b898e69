"""Runs vLLM once for all cases; prints what was measured at the end."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.peer.cases import CASES, MAX_TOKENS, requests, write_pictures
from tests.peer.environment import peer_python as peer_python_of_make
from tests.peer.environment import with_plugin

MAX_MODEL_LEN = 4096
SEED = int(os.environ.get("HUOYAN_TEST_SEED", "26"))
"""The same random checkpoints in every run, unless others are asked for: vLLM's rounding is not ours to bound."""
_REPORT: list[str] = []


@pytest.fixture(scope="session")
def peer_python() -> str:
    found = peer_python_of_make()
    if found is None:
        pytest.skip(
            "HUOYAN_PEER_PYTHON does not name the python of an environment with vLLM: run `make test-peer`"
        )
    return found


@pytest.fixture(scope="session")
def jobs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, peer_python: str
) -> dict[str, Any]:
    """What each case of this run asks, by its name."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = {param["compared"] for param in params if "compared" in param}
    root = tmp_path_factory.mktemp("peer")
    (root / "pictures").mkdir()
    pictures = write_pictures(root / "pictures")
    asked = {}
    for i, case in enumerate(CASES):
        if case not in selected:
            continue
        folder = case.write(root / f"checkpoint-{i}", SEED + i)
        if not (folder / "config.json").exists():
            continue
        asked[case.name] = {
            "folder": str(folder),
            "dtype": case.compute,
            "max_model_len": MAX_MODEL_LEN,
            "max_tokens": MAX_TOKENS,
            "mm_processor_kwargs": case.options,
            "requests": requests(case, pictures),
        }
    return asked


@pytest.fixture(scope="session")
def peer_answers(
    jobs: dict[str, Any], peer_python: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """vLLM's answers, by the case's name."""
    root = tmp_path_factory.mktemp("answers")
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_answers.py")
    started = time.perf_counter()
    with (root / "log").open("w") as log:
        ended = subprocess.run(
            [peer_python, str(script), str(root / "jobs.json"), str(root / "answers.json")],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=with_plugin(root / "site"),
            timeout=900,
            check=False,
        )
    _REPORT.append(f"vLLM, all cases: {time.perf_counter() - started:.0f} s")
    answers = json.loads((root / "answers.json").read_text()) if (root / "answers.json").exists() else {}
    if ended.returncode and len(answers) < len(jobs):
        lines = (root / "log").read_text().splitlines()
        _REPORT.append("vLLM stopped: " + " | ".join(line[-300:] for line in lines[-12:]))
    return answers


@pytest.fixture(scope="session")
def report() -> list[str]:
    """Lines that are printed after the tests, whether they pass or not."""
    return _REPORT


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _REPORT:
        terminalreporter.section("agreement with vLLM")
        for line in _REPORT:
            terminalreporter.write_line(line)
