"""The drawings that `tiny` is quantized with."""

from __future__ import annotations

import json
from pathlib import Path

import make_calibration
from evaluate import jobs
from huoyan.quantize.calibration import read_calibration
from huoyan_training.families import FAMILIES


def test_the_set_is_read_by_the_quantizer_and_the_same_every_time(tmp_path: Path) -> None:
    first, second = (make_calibration.write(tmp_path / name, 24) for name in ("a", "b"))
    assert first.read_text() == second.read_text()
    items = read_calibration(first)
    assert len(items) == 24
    assert [p.digest for i in items for p in i.pictures] == [
        p.digest for i in read_calibration(second) for p in i.pictures
    ]
    assert all(item.answer for item in items)
    assert {len(item.pictures) for item in items} >= {0, 1, 2}
    rows = [json.loads(line) for line in first.read_text(encoding="utf-8").splitlines()]
    assert len({row["question"] for row in rows}) > 12
    assert any(ord(c) > 0x4E00 for row in rows for c in row["question"])


def test_no_seed_of_the_evaluation_is_used() -> None:
    evaluated = {seed for seed, _, _ in jobs(list(FAMILIES), 2000)}
    assert not evaluated & set(range(make_calibration.FIRST_SEED, make_calibration.FIRST_SEED + 10_000))
