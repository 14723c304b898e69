"""What goes to standard error: notes and bars, never mixed into an answer."""

from __future__ import annotations

import sys


def dim(text: str) -> None:
    """One grey line on standard error."""
    if sys.stderr.isatty():
        print(f"\x1b[2m{text}\x1b[0m", file=sys.stderr)
    else:
        print(text, file=sys.stderr)
