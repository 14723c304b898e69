"""`huoyan version`."""

from __future__ import annotations

import typer

from huoyan.version import __version__


def version() -> None:
    """Print the version."""
    print(f"huoyan {__version__}")


def print_if(asked: bool) -> None:
    """`huoyan --version`."""
    if asked:
        version()
        raise typer.Exit
