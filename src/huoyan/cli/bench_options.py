"""Options that the workloads of `huoyan bench` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL = "The model"
_HOW = "How it is measured"

BenchModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="NAME", rich_help_panel=_MODEL, show_default=False,
        help="A folder, a hub name, tiny, or sizes alone: minicpm-v-2_6, minicpm-v-2_6-int4, small, small-int4 "
        "(random weights); default $HUOYAN_MODEL, else minicpm-v-2_6.",
    ),
]  # fmt: skip
LoadFormatOption = Annotated[
    str,
    typer.Option(
        "--load-format", rich_help_panel=_MODEL,
        help="dummy: random weights of the folder's sizes; its own are not read.",
    ),
]  # fmt: skip
MaxNumSeqsOption = Annotated[
    int,
    typer.Option("--max-num-seqs", min=1, rich_help_panel=_MODEL, help="Sequences of one step at most."),
]
OutputOption = Annotated[int, typer.Option("--output", min=2, help="Tokens of an answer.")]
WarmupOption = Annotated[
    int, typer.Option("--warmup", min=0, rich_help_panel=_HOW, help="Runs of each row that are not counted.")
]
RepeatsOption = Annotated[
    int, typer.Option("--repeats", min=1, rich_help_panel=_HOW, help="Runs of each row that are counted.")
]
SeedOption = Annotated[
    int, typer.Option("--seed", rich_help_panel=_HOW, help="Of random words, pictures, arrivals.")
]
JsonFileOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", rich_help_panel=_HOW, help="Write all of it as JSON too."),
]
PictureOption = Annotated[
    str, typer.Option("--picture", metavar="SIZE", help="1344x896, 1344x896*4 for four, or none.")
]
