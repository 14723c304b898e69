"""What must not be slow or noisy: help, version, the imports behind them."""

from __future__ import annotations

import errno
import functools
import json
import subprocess
import sys

import pytest

from huoyan.cli import env as env_command
from huoyan.version import __version__
from tests.cli.conftest import Command, environment

HEAVY = ("torch", "numpy", "PIL", "av", "tokenizers", "transformers", "huggingface_hub", "jinja2")


@pytest.mark.parametrize(
    "code",
    [
        "import huoyan",
        "import huoyan.cli.main",
        "from huoyan.cli.main import run; run(['--help'])",
        "from huoyan.cli.main import run; run(['ask', '--help'])",
        "from huoyan.cli.main import run; run(['bench', 'latency', '--help'])",
        "from huoyan.cli.main import run; run(['models'])",
        "from huoyan.cli.main import run; run(['ask', 'none.png'])",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    check = f"{code}\nimport sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", check], env=environment(), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_compiler_is_not_imported_on_the_way_to_a_model() -> None:
    """`torch._dynamo` would add some two seconds to every start."""
    check = (
        "import sys, torch\n"
        "from tests.models.small import CONFIG\n"
        "from huoyan.models.config import parse_model_config\n"
        "from huoyan.models.weights import build_model\n"
        "import huoyan.engine.engine, huoyan.api.frontend, huoyan.media.picture\n"
        "build_model(parse_model_config(CONFIG))\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor', 'sympy', 'transformers') if m in sys.modules])"
    )
    settings = environment()
    settings["PYTHONPATH"] += f":{settings['PYTHONPATH'].removesuffix('/src')}"
    done = subprocess.run(
        [sys.executable, "-c", check], env=settings, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], [], *[[c, "--help"] for c in ("ask", "batch", "env")]]
)
def test_help_is_there(huoyan: Command, arguments: list[str]) -> None:
    done = huoyan(*arguments)
    assert done.code == 0
    assert "Usage" in done.out + done.err
    assert "ask" in done.out + done.err or "Options" in done.out


def test_version(huoyan: Command) -> None:
    assert huoyan("version").out == huoyan("--version").out == f"huoyan {__version__}\n"


def test_an_unknown_command_is_one_line(huoyan: Command) -> None:
    done = huoyan("aks")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "aks" in done.err


def test_env_is_worth_pasting_and_holds_no_secrets(huoyan: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    monkeypatch.setenv("HUOYAN_API_KEY", "sk-abcdef")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:abcdef@mirror.example.org/x")
    done = huoyan("env")
    assert "abcdef" not in done.out
    assert "https://***@mirror.example.org/x" in done.out
    report = json.loads(huoyan("env", "--json").out)
    assert report["huoyan"]["version"] == __version__
    assert report["packages"]["torch"][0].isdigit()
    assert report["environment"]["HF_TOKEN"] == "set (not shown)"
    assert "memory" in report["system"]
    assert {"devices", "models"} <= report.keys()


def test_env_survives_a_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "cannot be imported" in env_command.collect()["devices"]["torch"]


def test_a_machine_in_the_way_is_no_bug(huoyan: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HUOYAN_DEBUG", raising=False)

    def fail(error: OSError) -> None:
        raise error

    locked = PermissionError(errno.EACCES, "Permission denied", "/locked/x")
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, code, words in ((locked, 2, "no permission for /locked/x"), (full, 4, "no space left")):
        monkeypatch.setattr(env_command, "collect", functools.partial(fail, error))
        done = huoyan("env")
        assert (done.code, done.err.count("\n")) == (code, 1)
        assert words in done.err


def test_env_survives_a_cache_it_may_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/locked/hub")

    monkeypatch.setattr("huoyan.models.local_models.list_local_models", fail)
    assert env_command.collect()["models"] == {"error": "/locked/hub: Permission denied"}


def test_a_bug_is_called_one(huoyan: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HUOYAN_DEBUG", raising=False)
    monkeypatch.setattr(env_command, "collect", lambda: 1 / 0)
    done = huoyan("env")
    assert done.code == 1
    assert "this is a bug: ZeroDivisionError" in done.err
    assert done.err.count("\n") == 1
