"""A comparison as a picture: one small bar chart a measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huoyan.bench.rows import readable
from huoyan.errors import InputError
from huoyan.planning.plot import need_matplotlib
from huoyan.planning.sizes import GIB

if TYPE_CHECKING:
    from huoyan.bench.compare import Column

_COLOURS = ("#30638e", "#edae49", "#8fc0dd", "#d1495b")


def draw(found: Sequence[Column], target: str | Path) -> None:
    """Write the chart; the file's ending says of which kind.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    panels: dict[str, list[float]] = {
        "beams, output tok/s": [column.beams.output_per_s for column in found],
        "greedy, output tok/s": [column.greedy.output_per_s for column in found],
        "model, GiB": [column.model_bytes / GIB for column in found],
        "longest context": [column.longest.proved for column in found],
        "largest batch": [column.batch.proved for column in found],
    }
    names = [Path(column.model).name for column in found]
    figure = Figure(figsize=(2.4 * len(panels), 3.2), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        # By place, not by name: two checkpoints may be called alike.
        bars = axes.bar(range(len(values)), values, color=_COLOURS[: len(values)], width=0.6)
        axes.bar_label(bars, [readable(value) for value in values], fontsize=9)
        axes.set_xticks(range(len(values)), names, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_yticks([])
        axes.margins(y=0.15)
        axes.spines[["top", "right", "left"]].set_visible(False)
    save(figure, target)


def save(figure: object, target: str | Path) -> None:
    try:
        figure.savefig(target, dpi=150)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {target}: {' '.join(str(error).split())}") from None
