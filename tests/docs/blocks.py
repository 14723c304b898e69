"""The code blocks of a page: what runs, what is shown as its output, what says that it is not run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

NOT_RUN = ("# not run by the test of this page: ", "# 本页的测试不运行这一段：")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"\s*(?<![^\s])#.*$")


@dataclass(frozen=True)
class Block:
    """A ```bash or ```python block. `shown` is the ```text block right behind it, or None."""

    kind: str
    code: str
    start: int
    shown: str | None
    shown_at: tuple[int, int] | None
    """Where the text of `shown` stands in the page."""

    @property
    def runs(self) -> bool:
        return not self.code.startswith(NOT_RUN)

    @property
    def bare(self) -> str:
        """The code without comments and empty lines: the same in every language of the page."""
        lines = [_COMMENT.sub("", line) for line in self.code.splitlines()]
        return "\n".join(line for line in lines if line.strip())


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    blocks = []
    for number, match in enumerate(found):
        if match[1] not in ("bash", "python"):
            continue
        after = found[number + 1] if number + 1 < len(found) else None
        behind = after is not None and after[1] == "text" and text[match.end() : after.start()].isspace()
        blocks.append(
            Block(
                match[1],
                match[2],
                match.start(),
                after[2] if after is not None and behind else None,
                after.span(2) if after is not None and behind else None,
            )
        )
    return blocks
