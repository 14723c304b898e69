"""`huoyan models`: which checkpoints are on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from huoyan.cli.options import DEFAULT_MODEL

if TYPE_CHECKING:
    from huoyan.models.local_models import LocalModel


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the models on this machine: the embedded ones and those in the hubs' caches.

    Any name in the first column can be given to [bold]--model[/bold]; the network is not touched.
    """
    from huoyan.models.local_models import list_local_models

    found = list_local_models()
    if as_json:
        _print_json(found)
    else:
        _print_table(found)


def _print_json(found: list[LocalModel]) -> None:
    import json

    rows = [
        {
            "name": model.name,
            "source": model.source,
            "path": str(model.path),
            "bytes": model.size,
            "version": model.version,
            "dtype": model.dtype,
            "int4": model.int4,
            "complete": model.complete,
            "missing": list(model.missing),
        }
        for model in found
    ]
    print(json.dumps(rows, ensure_ascii=False, indent=2))


def _print_table(found: list[LocalModel]) -> None:
    rows = [("model", "MiniCPM-V", "weights", "size", "state", "where")]
    rows += [
        (
            f"{model.name} (demonstration)" if model.source == "embedded" else model.name,
            model.version or "?",
            "int4" if model.int4 else model.dtype or "?",
            readable_size(model.size),
            "complete" if model.complete else f"incomplete (no {model.missing[0]})",
            str(model.path),
        )
        for model in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))
    if all(model.source == "embedded" for model in found):
        print(f"\nNo downloaded model. `huoyan ask --model {DEFAULT_MODEL} …` downloads one (16 GB).")


def readable_size(size: int) -> str:
    """`15.2 GB`, `9.8 MB`: decimal units, as disks and hubs count."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
