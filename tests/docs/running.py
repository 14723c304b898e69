"""Run a page's blocks as a reader would: from the repository's root, with `huoyan` on the PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.docs.blocks import Block

REPOSITORY = Path(__file__).parents[2]
_MEDIA = Path("src/huoyan/tiny/media")
_MARK = "-- the next block --"


def prepare(folder: Path) -> Path:
    """A root to run in: copies of the example pictures where the pages look for them, and the command."""
    root = folder / "root"
    shutil.copytree(REPOSITORY / _MEDIA, root / _MEDIA)
    command = folder / "bin" / "huoyan"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m huoyan "$@"\n')
    command.chmod(0o755)
    return root


def run_bash(block: Block, root: Path) -> str:
    """The standard output of one block. Raises CalledProcessError with what it said."""
    return _run(["bash", "-euo", "pipefail", "-c", block.code], root)


def run_python(blocks: Sequence[Block], root: Path) -> list[str]:
    """The outputs of a page's Python blocks, which are one session."""
    code = f"print({_MARK!r})\n".join(block.code for block in blocks)
    return _run([sys.executable, "-c", code], root).split(f"{_MARK}\n")


def _run(command: list[str], root: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HUOYAN_")}
    path = f"{root.parent / 'bin'}{os.pathsep}{kept.get('PATH', '')}"
    settings = {"PATH": path, "PYTHONPATH": str(REPOSITORY / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=root, env=kept | settings, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout
