"""`huoyan bench`: how fast a model runs on this machine, beside what the machine allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from huoyan.cli import bench_compare
from huoyan.cli.bench_options import (
    BenchModelOption,
    JsonFileOption,
    LoadFormatOption,
    MaxNumSeqsOption,
    OutputOption,
    PictureOption,
    RepeatsOption,
    SeedOption,
    WarmupOption,
)
from huoyan.cli.options import (
    DeviceOption,
    DtypeOption,
    GpuMemoryOption,
    HubOption,
    MaxModelLenOption,
    RevisionOption,
)

if TYPE_CHECKING:
    from huoyan.bench.opened import Opened
    from huoyan.bench.rows import Row
    from huoyan.bench.workloads import Session

DEFAULT_SHAPE = "minicpm-v-2_6"
app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help=(
        "Measure this machine and a model on it: each row stands beside the least time that the device's own "
        "bandwidth and arithmetic, measured in the same run, allow.\n\n"
        "[bold]huoyan bench latency --model tiny[/bold] tries it."
    ),
)


@app.command()
def latency(
    model: BenchModelOption = None,
    inputs: Annotated[str, typer.Option("--input", help="Tokens of a prompt; several with commas.")] = "512",
    output: OutputOption = 128,
    batch: Annotated[str, typer.Option("--batch", help="Requests at once; several with commas.")] = "1",
    load_format: LoadFormatOption = "auto",
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 256,
    gpu_memory: GpuMemoryOption = None,
    warmup: WarmupOption = 1,
    repeats: RepeatsOption = 3,
    seed: SeedOption = 0,
    json_file: JsonFileOption = None,
) -> None:
    """Prompts of words: first token, time between tokens, tokens a second."""
    from huoyan.bench import workloads
    from huoyan.bench.requests import parse_numbers

    given = locals()
    lengths, batches = parse_numbers(inputs, "--input"), parse_numbers(batch, "--batch")
    with _session(given) as session:
        _report("latency", session.model, workloads.latency(session, lengths, output, batches), given)


@app.command()
def throughput(
    model: BenchModelOption = None,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests in all.")] = 64,
    picture: PictureOption = "1344x896",
    words: Annotated[int, typer.Option("--words", min=1, help="Tokens of a prompt without a picture.")] = 256,
    output: OutputOption = 128,
    load_format: LoadFormatOption = "auto",
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 256,
    gpu_memory: GpuMemoryOption = None,
    warmup: WarmupOption = 1,
    repeats: RepeatsOption = 3,
    seed: SeedOption = 0,
    json_file: JsonFileOption = None,
) -> None:
    """Many requests at once, each with a picture of its own: requests and tokens a second."""
    from huoyan.bench import workloads
    from huoyan.bench.requests import parse_pictures

    given = locals()
    parse_pictures(picture)
    with _session(given) as session:
        rows = workloads.throughput(session, requests, picture, words, output)
        _report("throughput", session.model, rows, given)


@app.command()
def pictures(
    model: BenchModelOption = None,
    sizes: Annotated[
        str, typer.Option("--sizes", help="Sizes with commas; 1344x896*4 is one request with four.")
    ] = "448x448,1344x896,1344x1344,1344x896*4",
    load_format: LoadFormatOption = "auto",
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 256,
    gpu_memory: GpuMemoryOption = None,
    warmup: WarmupOption = 1,
    repeats: RepeatsOption = 5,
    seed: SeedOption = 0,
    json_file: JsonFileOption = None,
) -> None:
    """The first token after pictures: resizing, encoding and the prompt together."""
    from huoyan.bench import workloads
    from huoyan.bench.requests import parse_pictures

    given = locals()
    for size in sizes.split(","):
        parse_pictures(size)
    with _session(given) as session:
        _report("pictures", session.model, workloads.pictures(session, sizes.split(",")), given)


@app.command()
def beams(
    model: BenchModelOption = None,
    widths: Annotated[str, typer.Option("--beams", help="Widths with commas; 1 is greedy.")] = "1,3",
    picture: PictureOption = "1344x896",
    output: OutputOption = 64,
    load_format: LoadFormatOption = "auto",
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 256,
    gpu_memory: GpuMemoryOption = None,
    warmup: WarmupOption = 1,
    repeats: RepeatsOption = 3,
    seed: SeedOption = 0,
    json_file: JsonFileOption = None,
) -> None:
    """A step of a beam search on a picture, and a greedy one beside it."""
    from huoyan.bench import workloads
    from huoyan.bench.requests import parse_numbers, parse_pictures

    given = locals()
    parse_pictures(picture)
    numbers = parse_numbers(widths, "--beams")
    with _session(given) as session:
        _report("beams", session.model, workloads.beams(session, numbers, picture, output), given)


@app.command()
def video(
    model: BenchModelOption = None,
    frames: Annotated[
        str, typer.Option("--frames", help="Frames of a video; several with commas.")
    ] = "16,64",
    size: Annotated[str, typer.Option("--size", help="Of a frame.")] = "640x360",
    load_format: LoadFormatOption = "auto",
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 256,
    gpu_memory: GpuMemoryOption = None,
    warmup: WarmupOption = 1,
    repeats: RepeatsOption = 3,
    seed: SeedOption = 0,
    json_file: JsonFileOption = None,
) -> None:
    """The first token after the frames of a video; they are given, so that no file is decoded."""
    from huoyan.bench import workloads
    from huoyan.bench.requests import parse_numbers, parse_pictures
    from huoyan.errors import InputError

    given = locals()
    numbers = parse_numbers(frames, "--frames")
    if len(parse_pictures(size)) != 1:
        raise InputError(f"--size is one size, such as 640x360, not {size!r}")
    with _session(given) as session:
        _report("video", session.model, workloads.video(session, numbers, size), given)


@app.command()
def serve(
    model: BenchModelOption = None,
    rate: Annotated[
        float, typer.Option("--rate", min=0.001, help="Requests a second, arriving at random.")
    ] = 2.0,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests in all.")] = 64,
    sizes: Annotated[
        str, typer.Option("--sizes", help="Their pictures, in turns, with commas; none is words alone.")
    ] = "none,448x448,1344x1344",
    output: OutputOption = 128,
    load_format: LoadFormatOption = "auto",
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 256,
    gpu_memory: GpuMemoryOption = None,
    seed: SeedOption = 0,
    json_file: JsonFileOption = None,
) -> None:
    """Requests that arrive at random: first token, and the time between tokens while big pictures arrive."""
    from huoyan.bench.requests import Requests, parse_pictures
    from huoyan.bench.serve import Arrivals
    from huoyan.bench.serve import serve as run

    given = locals()
    kinds = sizes.split(",")
    for size in kinds:
        parse_pictures(size)
    with _opened(given) as opened:
        rows = run(opened, Requests(seed), Arrivals(rate, requests, seed), kinds, output)
        _report("serve", opened, rows, given)


app.command("compare")(bench_compare.compare)

_OPTIONS = (
    "load_format", "hub", "revision", "device", "dtype", "max_model_len", "max_num_seqs",
    "gpu_memory", "seed",
)  # fmt: skip


@contextlib.contextmanager
def _opened(given: dict[str, Any]) -> Iterator[Opened]:
    import os

    from huoyan.bench.opened import opened

    name = given["model"] or os.environ.get("HUOYAN_MODEL") or DEFAULT_SHAPE
    with opened(name, **{option: given[option] for option in _OPTIONS}) as model:
        yield model


@contextlib.contextmanager
def _session(given: dict[str, Any]) -> Iterator[Session]:
    from huoyan.bench.requests import Requests
    from huoyan.bench.workloads import Session

    with _opened(given) as model:
        yield Session(model, model.llm(), Requests(given["seed"]), given["warmup"], given["repeats"])


def _report(workload: str, model: Opened, rows: Iterable[Row], given: dict[str, Any]) -> None:
    from huoyan.bench.opened import describe_machine
    from huoyan.bench.rows import Report, table
    from huoyan.cli.console import dim

    machine = describe_machine(model.engine.model.device, model.probe)
    about = model.describe()
    print(
        f"{workload}: {about['name']}, {about['dtype']}"
        + (f" with int4 in groups of {about['int4_group_size']}" if about["int4_group_size"] else "")
        + f", {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"loaded in {about['load_s']:.1f} s"
    )
    print(model.probe.line())
    done = []
    for row in rows:
        dim(f"measured {row.name}")
        done.append(row)
    print(f"\n{table(done)}")
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in given.items()
        if isinstance(value, (str, int, float, Path, type(None)))
    }
    file = given["json_file"]
    if file is not None:
        from huoyan.bench.text_files import write_json

        write_json(file, Report(workload, about, machine, settings, done).to_dict())
