"""`huoyan plan`: what fits a card, before it is rented."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from huoyan.cli.options import DEFAULT_MODEL, HubOption, RevisionOption
from huoyan.planning.sizes import gib

if TYPE_CHECKING:
    from rich.table import Table

    from huoyan.planning.plan import Plan

_REQUEST = "One request"
_ENGINE = "The engine"


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a hub name (only its headers are read), tiny, or minicpm-v-2_6[-int4], sizes without "
            f"a checkpoint; default $HUOYAN_MODEL, else {DEFAULT_MODEL}.",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="CARD",
            show_default=False,
            help='Memory (24GiB), a card ("RTX 4090"), or auto, the one of this machine; default auto, else 24GiB.',
        ),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=0, help="Pictures.", rich_help_panel=_REQUEST)] = 1,
    resolution: Annotated[
        str, typer.Option("--resolution", metavar="WxH", help="Of each picture.", rich_help_panel=_REQUEST)
    ] = "1344x896",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of the answer.", rich_help_panel=_REQUEST)
    ] = 512,
    kv_cache_dtype: Annotated[
        str,
        typer.Option("--kv-cache-dtype", help="auto, int8 or fp8.", rich_help_panel=_ENGINE),
    ] = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len", min=1, help="Tokens of question and answer at most.", rich_help_panel=_ENGINE
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", min=1, help="Sequences at once at most.", rich_help_panel=_ENGINE)
    ] = 256,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option("--max-num-batched-tokens", min=1, help="Tokens of a step.", rich_help_panel=_ENGINE),
    ] = 2048,
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object; sizes are bytes.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw the memory as bars (needs 'huoyan[plot]').",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what a model takes of a card and what fits beside it, in 16 bits and in int4, without loading it.

    huoyan plan openbmb/MiniCPM-V-2_6 --gpu "RTX 4090"
    huoyan plan ./my-checkpoint --gpu 12GiB --images 4 --resolution 1920x1080

    Memory is what the engine keeps to (LLM(gpu_memory=...), --gpu-memory).
    Speeds are limits of the card's memory and arithmetic, not measurements.
    """  # fmt: skip
    from huoyan.cli.models_option import model_name
    from huoyan.planning.plan import plan as make_plan

    if plot is not None:
        # Before the network is asked for anything.
        from huoyan.planning.plot import need_matplotlib

        need_matplotlib()
    found = make_plan(
        model_name(model),
        gpu,
        images=images,
        resolution=resolution,
        max_tokens=max_tokens,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        hub=hub,
        revision=revision,
    )  # fmt: skip
    if plot is not None:
        from huoyan.planning.plot import draw

        draw(found, plot)
        print(f"huoyan: wrote {plot}", file=sys.stderr)
    if as_json:
        import json

        print(json.dumps(found.as_dict(), ensure_ascii=False, indent=2))
    else:
        _print(found)


def _print(plan: Plan) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    names = [variant.name + (" (predicted)" if variant.predicted else "") for variant in plan.variants]
    amount = gib(plan.budget)
    same = plan.card.replace(" ", "") == amount.replace(" ", "").replace(".0", "")
    request = plan.request
    shape = ""
    if request.images:
        width, height = request.resolution
        shape = f"{request.images} of {width}x{height} ({request.slices} slices), "
    console.print(f"{plan.model} on {amount if same else f'{plan.card} ({amount})'}\n")
    console.print(_memory(plan, names))
    for variant, name in zip(plan.variants, names, strict=True):
        if not variant.fits:
            console.print(f"{name} does not fit: without a KV cache it takes {gib(variant.parts.whole)}.")
    console.print()
    console.print(_caches(plan, names))
    console.print(
        f"A request of the batch: {shape}{request.prompt_tokens} tokens in, {request.max_tokens} out. "
        f"The checkpoint's context: {plan.context:,}.\n"
    )
    console.print(_speeds(plan, names))
    console.print(
        f"Limits, not measurements: what memory and arithmetic of a card allow, at {request.length} tokens a sequence."
    )


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    return made


def _memory(plan: Plan, names: list[str]) -> Table:
    rows = _table("memory", *names)
    for label, field in _PARTS:
        cells = [getattr(variant.parts, field) for variant in plan.variants]
        if any(cells):
            rows.add_row(label, *map(gib, cells))
    return rows


def _caches(plan: Plan, names: list[str]) -> Table:
    rows = _table("KV cache", *names)

    def batch(count: int) -> str:
        return f"{count:,}" + (" (max_num_seqs)" if count == plan.max_num_seqs else "")

    for i, first in enumerate(plan.variants[0].kv):
        options = [variant.kv[i] for variant in plan.variants]
        kind = first.kv_cache_dtype if first.kv_cache_dtype != "auto" else "16 bits"
        rows.add_row(f"{kind}, bytes a token", *(f"{option.bytes_per_token:,}" for option in options))
        rows.add_row("  tokens", *(f"{option.tokens:,}" for option in options))
        rows.add_row("  longest context", *(f"{option.longest_context:,}" for option in options))
        rows.add_row("  largest batch", *(batch(option.largest_batch) for option in options))
    return rows


def _speeds(plan: Plan, names: list[str]) -> Table:
    from huoyan.planning.roofline import BATCHES

    short = [name.partition(" ")[0] for name in names]
    rows = _table("tokens/s at most", *(f"{name} x{batch}" for name in short for batch in BATCHES), "prompt")
    for limits in zip(*(variant.limits for variant in plan.variants), strict=True):
        if any(limit.fits for limit in limits):
            cells = [limit.decode[batch] for limit in limits for batch in BATCHES]
            shown = ("-" if cell is None else f"{cell:,.0f}" for cell in cells)
            rows.add_row(limits[0].card, *shown, f"{limits[0].prefill:,.0f}")
    return rows


_PARTS = (
    ("decoder", "decoder"),
    ("embeddings", "embeddings"),
    ("head", "head"),
    ("encoder, resampler", "vision"),
    ("tables of positions", "tables"),
    ("KV cache", "kv_cache"),
    ("workspace of a step", "workspace"),
    ("recent pictures", "pictures"),
    ("CUDA graphs", "graphs"),
    ("allocator's rounding", "slack"),
    ("CUDA context (estimate)", "context"),
)
