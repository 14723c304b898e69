"""Both READMEs: every block runs and prints what the page shows, and both say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import Block, read_blocks
from tests.docs.running import REPOSITORY, prepare, run_bash, run_python

ENGLISH, CHINESE = REPOSITORY / "README.md", REPOSITORY / "README.zh-CN.md"
NOT_RUN = 3
REFRESH = "the page shows another output: `python docs/refresh.py` writes the present one into it"
BLOCKS = read_blocks(ENGLISH)
BASH = [block for block in BLOCKS if block.kind == "bash" and block.runs]


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.code.splitlines()[-1][:40])
def test_bash_blocks_print_what_is_shown(block: Block, tmp_path: Path) -> None:
    assert run_bash(block, prepare(tmp_path)) == block.shown, REFRESH


def test_python_blocks_print_what_is_shown(tmp_path: Path) -> None:
    blocks = [block for block in BLOCKS if block.kind == "python" and block.runs]
    printed = run_python(blocks, prepare(tmp_path))
    assert printed == [block.shown for block in blocks], REFRESH


def test_what_is_not_run_says_so_and_stays_little() -> None:
    assert sum(not block.runs for block in BLOCKS) == NOT_RUN
    assert len(BLOCKS) - NOT_RUN >= 7


def test_both_languages_have_the_same_blocks_and_outputs() -> None:
    """So what runs of one page runs of the other."""
    chinese = read_blocks(CHINESE)
    assert [(b.kind, b.bare, b.shown, b.runs) for b in BLOCKS] == [
        (b.kind, b.bare, b.shown, b.runs) for b in chinese
    ]
    counts = [
        [
            len(re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE))
            for page in (ENGLISH, CHINESE)
        ]
        for pattern in (r"^## ", r"^\|", r"^- ")
    ]
    assert all(one == other for one, other in counts), counts


@pytest.mark.parametrize("page", sorted(REPOSITORY.glob("*.md")) + sorted(REPOSITORY.glob("docs/*.md")))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
