"""A plan as a picture: one stacked bar a variant."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from huoyan.errors import InputError
from huoyan.planning.sizes import GIB, gib

if TYPE_CHECKING:
    from huoyan.planning.plan import Plan

_BANDS = (
    ("decoder", "#30638e", ("decoder",)),
    ("embeddings, head", "#4f8fba", ("embeddings", "head")),
    ("encoder, resampler", "#8fc0dd", ("vision", "tables")),
    ("KV cache", "#edae49", ("kv_cache",)),
    ("workspace, pictures", "#d1495b", ("workspace", "pictures")),
    ("graphs, rounding, CUDA context", "#8d8d92", ("graphs", "slack", "context")),
)
"""What is one band of the bars, its colour, and the parts in it."""


def need_matplotlib() -> None:
    """Raises InputError where it is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'huoyan[plot]'")


def draw(plan: Plan, target: str | Path) -> None:
    """Write the plan's memory as a picture; the file's ending says of which kind.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.9 + 0.75 * len(plan.variants)), layout="constrained")
    axes = figure.subplots()
    names = [v.name + (" (predicted)" if v.predicted else "") for v in plan.variants]
    left = [0.0] * len(names)
    for label, colour, fields in _BANDS:
        sizes = [sum(getattr(v.parts, field) for field in fields) / GIB for v in plan.variants]
        bars = axes.barh(names, sizes, left=left, color=colour, label=label, height=0.6, edgecolor="white")
        for bar, size in zip(bars, sizes, strict=True):
            if size > 0.045 * plan.budget / GIB:
                middle = bar.get_x() + bar.get_width() / 2
                axes.text(
                    middle, bar.get_y() + bar.get_height() / 2, f"{size:.1f}", ha="center", va="center",
                    color="black" if colour in ("#edae49", "#8fc0dd") else "white", fontsize=9,
                )  # fmt: skip
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    budget = plan.budget / GIB
    axes.axvline(budget, color="black", linewidth=1.2)
    axes.set_xlim(0, 1.03 * max(budget, *left))
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{plan.model} on {plan.card} ({gib(plan.budget)})", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    try:
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {target}: {' '.join(str(error).split())}") from None
