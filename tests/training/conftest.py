"""The training package is not installed: its folder goes on the path for these tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
pytest.importorskip("matplotlib", reason="drawing text needs the extra huoyan[train]")
