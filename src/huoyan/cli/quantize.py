"""`huoyan quantize`: a checkpoint's language model in int4."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from huoyan.cli.console import dim
from huoyan.cli.options import HubOption, RevisionOption

if TYPE_CHECKING:
    from huoyan.quantize.run import QuantizeReport

_HOW = "How"
_CALIBRATION = "What it is calibrated with"


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a hub name (downloaded once), or tiny.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder to write.")],
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    bits: Annotated[int, typer.Option("--bits", help="4.", rich_help_panel=_HOW)] = 4,
    group_size: Annotated[
        int,
        typer.Option("--group-size", help="Inputs that share a scale: 32, 64 or 128.", rich_help_panel=_HOW),
    ] = 128,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="awq (searches on pictures), or rtn (rounds only).", rich_help_panel=_HOW
        ),
    ] = "awq",
    modules: Annotated[
        str,
        typer.Option("--modules", help="What is quantized; the rest keeps 16 bits.", rich_help_panel=_HOW),
    ] = "qkv,o,gate_up,down",
    clip: Annotated[
        bool, typer.Option("--clip/--no-clip", help="Let awq clip outliers.", rich_help_panel=_HOW)
    ] = True,
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate/--no-compensate",
            help="Round so that later inputs make up for earlier ones: nearer, slower.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    quantize_head: Annotated[
        str,
        typer.Option(
            "--quantize-head",
            help="int8: head and embedding in 8 bits (vLLM cannot read them); or none.",
            rich_help_panel=_HOW,
        ),
    ] = "none",
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu or cuda.", rich_help_panel=_HOW)
    ] = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="DIR_OR_JSONL",
            rich_help_panel=_CALIBRATION,
            help='Your pictures, or lines of {"image", "question", "answer"}; default a built-in set.',
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", min=16, rich_help_panel=_CALIBRATION, help="Leave out longer prompts."),
    ] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a model in int4: a quarter of the weights' memory, in the format this engine and vLLM read.

    huoyan quantize openbmb/MiniCPM-V-2_6 minicpm-v-2_6-int4
    huoyan quantize tiny tiny-int4 --calibration pictures/

    One layer is in memory at a time. OUT appears when it is whole; a stopped run
    goes on where it was when the same command is run again.
    """
    from huoyan.models.hub import resolve_model
    from huoyan.quantize.run import quantize as run

    folder = resolve_model(model, hub=hub, revision=revision)
    with _Bar() as bar, _say_how_to_go_on(out):
        report = run(
            folder,
            out,
            bits=bits,
            group_size=group_size,
            method=method,
            calibration=calibration,
            device=device,
            max_tokens=max_tokens,
            clip=clip,
            modules=modules,
            compensate=compensate,
            quantize_head=quantize_head,
            step=bar.show,
            note=dim,
        )
    if as_json:
        _print_json(report)
    else:
        print(summary(report))


@contextmanager
def _say_how_to_go_on(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if out.with_name(out.name + ".partial").exists():
            dim("stopped: the same command goes on with what is done")
        raise


def summary(report: QuantizeReport) -> str:
    """A few lines: what it cost in every layer, in answers and in time, and what to do next."""
    from huoyan.cli.models import readable_size

    lines = [f"{'layer':<7}error"]
    lines += [f"{note['layer']:<7}{100 * note['relative_error']:.1f} %" for note in report.layers]
    lines.append("")
    if report.perplexity_before is None or report.perplexity_after is None or report.agreement is None:
        lines.append("answers     not measured: the held-out calibration items have none")
    else:
        lines.append(
            f"perplexity  {report.perplexity_before:.4g} before, {report.perplexity_after:.4g} after"
        )
        lines.append(f"agreement   {100 * report.agreement:.1f} % of the answers' tokens are as before")
    lines.append(
        f"size        {readable_size(report.bytes_before)} before, {readable_size(report.bytes_after)} after"
    )
    if report.int8_head:
        lines.append("head        head and embedding in int8: huoyan reads them, vLLM does not")
    again = f", {report.resumed_layers} layers made earlier" if report.resumed_layers else ""
    lines.append(f"time        {report.seconds:.0f} s{again}")
    lines.append(f'\nhuoyan ask --model {report.folder} photo.jpg "what is this?"')
    return "\n".join(lines)


def _print_json(report: QuantizeReport) -> None:
    import json
    from dataclasses import asdict

    print(json.dumps(asdict(report) | {"folder": str(report.folder)}, ensure_ascii=False))


class _Bar:
    """Layers done, on a terminal only."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> _Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
            self._task = self._progress.add_task("calibrating", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, done: int, total: int, what: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total, description="layers")
