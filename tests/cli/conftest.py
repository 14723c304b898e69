"""A checkpoint with random weights, and the command in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from huoyan.cli.main import run as run_command
from tests.api.checkpoint import write_checkpoint

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Done:
    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture
def huoyan(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the command here."""

    def call(*arguments: object) -> Done:
        code = run_command([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    return call


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HUOYAN_")}
    return kept | {"PYTHONPATH": str(REPOSITORY / "src"), "HF_HUB_OFFLINE": "1"} | changes


def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
    """Start the command as a process of its own."""
    command = [sys.executable, "-m", "huoyan.cli.main", *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def red(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "red.png"
    Image.new("RGB", (300, 200), "red").save(path)
    return path
