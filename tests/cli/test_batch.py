"""`huoyan batch` as a command, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Command


def test_a_file_of_rows_is_answered_and_not_answered_twice(
    huoyan: Command, checkpoint: Path, red: Path
) -> None:
    source, target = red.parent / "in.jsonl", red.parent / "out.jsonl"
    rows = [
        {"id": "a", "image": "red.png", "prompt": "what?"},
        {"id": "b", "image": "missing.png", "prompt": "what?"},
        {"id": "c", "prompt": "hello", "params": {"max_tokens": 2}},
        {
            "custom_id": "d",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "red.png"}},
                            {"type": "text", "text": "what?"},
                        ],
                    }
                ],
                "max_tokens": 3,
            },
        },
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("batch", source, target, "--model", checkpoint, "--max-tokens", 4, "-c", 2)
    done = huoyan(*arguments)
    assert done.code == 0, done.err
    assert done.out == ""
    assert done.err.startswith('4 of 4 rows: 3 answered, 1 failed (see their "error")')
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row.get("custom_id", row["id"]) for row in written] == ["a", "b", "c", "d"]
    assert written[0]["completion_tokens"] == 4
    assert "missing.png" in written[1]["error"]["message"]
    assert written[2]["completion_tokens"] == 2
    assert written[3]["response"]["body"]["usage"]["completion_tokens"] == 3
    before = target.read_bytes()
    again = huoyan(*arguments)
    assert again.err == "4 of 4 rows: 0 answered, 4 were there already\n"
    assert target.read_bytes() == before


def test_a_missing_input_is_one_line(huoyan: Command, checkpoint: Path, tmp_path: Path) -> None:
    done = huoyan("batch", tmp_path / "none", tmp_path / "out", "-m", checkpoint)
    assert done.code == 2
    assert "is not there" in done.err
    assert "is a folder" in huoyan("batch", tmp_path, tmp_path / "out", "-m", checkpoint).err
    assert not (tmp_path / "out").exists()
