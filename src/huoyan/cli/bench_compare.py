"""`huoyan bench compare`: two checkpoints side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from huoyan.cli.bench_options import JsonFileOption, LoadFormatOption, SeedOption
from huoyan.cli.options import (
    DeviceOption,
    DtypeOption,
    GpuMemoryOption,
    HubOption,
    MaxModelLenOption,
    RevisionOption,
)


def compare(
    model_a: Annotated[str, typer.Argument(metavar="MODEL_A", help="A folder, a hub name, tiny, …")],
    model_b: Annotated[str, typer.Argument(metavar="MODEL_B", help="Another, such as tiny-int4.")],
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="What is asked about; default an airplane."),
    ] = None,
    beams: Annotated[int, typer.Option("--beams", min=2, help="Width of the beam search.")] = 3,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of an answer at most.")] = 1024,
    batch_length: Annotated[
        int, typer.Option("--batch-length", min=8, help="Tokens of each sequence of the largest batch.")
    ] = 2048,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it, such as compare.png.")
    ] = None,
    load_format: LoadFormatOption = "auto",
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            "--max-num-seqs",
            min=1,
            show_default=False,
            help="Sequences of one step at most; default: what the memory holds of --batch-length.",
        ),
    ] = None,
    small_kv: Annotated[
        str | None,
        typer.Option(
            "--small-kv",
            metavar="DTYPE",
            help="Run the largest batch with this 8-bit KV cache too: int8, fp8.",
        ),
    ] = None,
    gpu_memory: GpuMemoryOption = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times the question is asked.")] = 3,
    seed: SeedOption = 0,
    json_file: JsonFileOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --json FILE holds of the same question.")
    ] = False,
) -> None:
    """What one checkpoint gains over another: the recipe's table, each cell measured.

    huoyan bench compare openbmb/MiniCPM-V-2_6 minicpm-v-2_6-int4/ --gpu-memory 24GiB

    Speed and answer on one picture, with beams and greedy; the model's memory; the
    longest context, by generating at its end; the largest batch, by running it.
    --json is written after each cell, and --resume measures those that are missing.
    """
    import torch

    import huoyan
    from huoyan.api.loading import pick_device
    from huoyan.bench.compare import Question, markdown_table, text_table
    from huoyan.bench.compare import compare as run
    from huoyan.bench.opened import folder_of
    from huoyan.bench.text_files import write_json
    from huoyan.cli.console import dim
    from huoyan.errors import InputError
    from huoyan.media.picture import Picture
    from huoyan.models.hub import resolve_model

    if plot is not None:
        from huoyan.planning.plot import need_matplotlib

        need_matplotlib()
    file = picture or Path(huoyan.__file__).parent / "tiny" / "media" / "airplane.jpg"
    question = Question(Picture.open(file), beams, max_tokens, batch_length, repeats, seed)
    options = {
        "load_format": load_format, "hub": hub, "revision": revision, "device": device, "dtype": dtype,
        "max_model_len": max_model_len, "max_num_seqs": max_num_seqs, "gpu_memory": gpu_memory, "seed": seed,
    }  # fmt: skip
    where = (
        torch.cuda.get_device_name()
        if pick_device(device).startswith("cuda")
        else f"a CPU, {torch.get_num_threads()} threads"
    )
    height, width = question.picture.pixels.shape[:2]
    settings = {**options, "models": [model_a, model_b], "picture": str(file), "picture_size": [width, height],
                "beams": beams, "max_tokens": max_tokens, "batch_length": batch_length, "repeats": repeats,
                "small_kv": small_kv}  # fmt: skip
    kept: list[dict[str, Any]] = [{}, {}]
    if resume:
        if json_file is None:
            raise InputError("--resume goes on with a file: give --json FILE")
        kept = _kept(json_file, where, settings) or kept
    for model in (model_a, model_b):
        # A wrong name is told before the other model is measured, which takes minutes.
        with folder_of(model, load_format) as (name, _):
            resolve_model(name, hub=hub, revision=revision)

    def keep() -> None:
        if json_file is not None:
            write_json(json_file, {"device": where, "settings": settings, "models": kept})

    found = list(run((model_a, model_b), question, dim, small_kv, kept, keep, **options))
    print(markdown_table(found, question) if markdown else text_table(found, question))
    cap = f"inside {gpu_memory}" if gpu_memory else "without a cap"
    print(f"\nOn {where}, {cap}; memory of the model: {found[0].memory_source}.")
    keep()
    if plot is not None:
        from huoyan.bench.plot import draw

        draw(found, plot)


def _kept(file: Path, where: str, settings: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The cells in `file`; None where there is no such file.

    Raises:
        InputError: they are of another question or device.
    """
    import json

    from huoyan.errors import InputError

    if not file.exists():
        return None
    try:
        report = json.loads(file.read_text())
        kept, same = report["models"], (report["device"], report["settings"]) == (where, settings)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not what `huoyan bench compare --json` writes") from error
    if not same:
        raise InputError(f"{file} holds the cells of another question or device: give another file")
    cells: list[dict[str, Any]] = kept
    return cells
