"""The environment with vLLM: its python, and what a process there needs to find huoyan's plugin."""

from __future__ import annotations

import os
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_GROUP = re.compile(r'^\[project\.entry-points\."vllm\.general_plugins"\]\n((?:\w+ = ".*"\n)+)', re.MULTILINE)
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def peer_python() -> str | None:
    """The python that `make test-peer` names; None without it."""
    found = os.environ.get("HUOYAN_PEER_PYTHON")
    return os.path.abspath(found) if found else None


def with_plugin(folder: Path) -> dict[str, str]:
    """The variables of a process that has this tree's huoyan installed.

    `folder` gets what an installation leaves beside the package: a name, a version and the entry point as
    pyproject.toml has it. A real installation of another tree in the environment is hidden by it.
    """
    declared = _GROUP.search((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert declared is not None
    information = folder / "huoyan-0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: huoyan\nVersion: 0\n", encoding="utf-8"
    )
    entry_points = "[vllm.general_plugins]\n" + declared[1].replace('"', "")
    (information / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    return _plain() | {"PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY / "src")])}


def without_plugin() -> dict[str, str]:
    """The variables of a process in which vLLM loads no plugin, even one that is installed."""
    return _plain() | {"VLLM_PLUGINS": ""}


def _plain() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS")}
    return SETTINGS | kept
