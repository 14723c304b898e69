"""`huoyan models`: a table for people, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from huoyan.cli.models import readable_size
from tests.cli.conftest import Command
from tests.hub.test_names import write_model


def test_what_is_there_is_listed(huoyan: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    empty = huoyan("models")
    assert empty.code == 0
    assert "No downloaded model" in empty.out
    folder = write_model(tmp_path / "hf" / "models--openbmb--MiniCPM-V-2_6" / "snapshots" / "abc")
    (folder / "model-00002-of-00002.safetensors").unlink()
    table = huoyan("models").out
    assert "openbmb/MiniCPM-V-2_6" in table
    assert "incomplete (no model-00002-of-00002.safetensors)" in table
    rows = [row for row in json.loads(huoyan("models", "--json").out) if row["source"] == "huggingface"]
    assert [(row["name"], row["complete"], row["path"]) for row in rows] == [
        ("openbmb/MiniCPM-V-2_6", False, str(folder))
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (16_200_000_000, "16.2 GB"), (4e12, "4.0 TB")],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert readable_size(size) == text
