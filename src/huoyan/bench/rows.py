"""What a benchmark found: rows of measured numbers, each with its limit, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

METRICS = {
    "first_token_ms": "first token, ms",
    "first_token_p99_ms": "p99",
    "inter_token_ms": "between tokens, ms",
    "inter_token_p99_ms": "p99",
    "step_ms": "step, ms",
    "step_p99_ms": "p99",
    "answer_s": "answer, s",
    "answer_p99_s": "p99",
    "tokens_per_s": "tokens/s",
    "requests_per_s": "requests/s",
    "offered_per_s": "asked/s",
}
"""The name of each measure in JSON, and the head of its column."""


@dataclass(frozen=True)
class Row:
    """One kind of work. `limits` has the least time, or the most a second, that the device allows."""

    name: str
    measured: dict[str, float]
    limits: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A run: what was measured, on what, how."""

    workload: str
    model: dict[str, Any]
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def percentile(values: Sequence[float], part: float) -> float:
    """The value that `part` (0 to 1) of `values` are not above, between two neighbours where it falls there."""
    ordered = sorted(values)
    at = part * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 0.5)


def table(rows: Sequence[Row]) -> str:
    """Plain columns; behind each measure with a limit are the limit and what part of it was reached."""
    shown = [name for name in METRICS if any(name in row.measured for row in rows)]
    head, lines = [""], [[row.name] for row in rows]
    for name in shown:
        limited = any(name in row.limits for row in rows)
        head += [METRICS[name], "limit", "reached"] if limited else [METRICS[name]]
        for row, line in zip(rows, lines, strict=True):
            measured, limit = row.measured.get(name), row.limits.get(name)
            line.append(readable(measured))
            if limited:
                line += [readable(limit), _reached(name, measured, limit)]
    return columns([head, *lines])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first left, the others right; Chinese takes two places a character."""
    from rich.cells import cell_len

    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        spaces = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + spaces[0], *(space + cell for space, cell in zip(spaces[1:], row[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def readable(value: float | None) -> str:
    """Three digits that count; whole numbers from a hundred on."""
    if value is None:
        return ""
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return (
        f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}" if abs(value) >= 0.0995 else f"{value:.2g}"
    )


def _reached(name: str, measured: float | None, limit: float | None) -> str:
    if not measured or not limit:
        return ""
    part = measured / limit if name.endswith("_per_s") else limit / measured
    return f"{100 * part:.0f} %" if part >= 0.01 else f"{100 * part:.1g} %"
