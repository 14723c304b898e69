"""A hub on this machine, and a process of its own for each download (the hub's settings are read once)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub.server import Hub

REPOSITORY = Path(__file__).parents[2]
WORKER = """
import json, sys
from huoyan.errors import HuoyanError
from huoyan.models import hub_huggingface
from huoyan.models.hub import resolve_model
import huggingface_hub.constants
hub_huggingface.LARGE = 1000
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10000
given = json.loads(sys.argv[1])
try:
    print(json.dumps({"folder": str(resolve_model(**given))}))
except HuoyanError as error:
    print(json.dumps({"error": str(error), "code": error.exit_code}))
"""

Resolve = Callable[..., dict[str, Any]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub().serving() as serving:
        yield serving


@pytest.fixture
def resolve(hub: Hub, tmp_path: Path) -> Resolve:
    """`resolve_model` in a new process against the stand-in, with a cache of its own."""

    def run(name: str, *, environment: dict[str, str] | None = None, **given: Any) -> dict[str, Any]:
        settings = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MODELSCOPE_"))
        }
        settings |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "MODELSCOPE_CACHE": str(tmp_path / "ms"),
            "HOME": str(tmp_path),
            "PYTHONPATH": str(REPOSITORY / "src"),
            "NO_PROXY": "*",
        } | (environment or {})
        done = subprocess.run(
            [sys.executable, "-c", WORKER, json.dumps({"name": name, **given})],
            env=settings,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        result["stderr"] = done.stderr
        return result

    return run
