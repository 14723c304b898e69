"""`huoyan ask`: one question about pictures or a video, answered as it is generated."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from huoyan.cli.options import (
    DeviceOption,
    DtypeOption,
    EngineOption,
    ExecutorOption,
    GpuMemoryOption,
    HubOption,
    KVCacheDtypeOption,
    MaxModelLenOption,
    ModelOption,
    PipelineParallelOption,
    RevisionOption,
    SpeculativeNgramOption,
    TensorParallelOption,
    speculative_config,
)

if TYPE_CHECKING:
    from huoyan.api.llm import LLM
    from huoyan.api.outputs import RequestOutput
    from huoyan.api.sampling_params import SamplingParams

_MODEL = "The model"
_ANSWER = "The answer"
_MEDIA = "What is asked about"


def ask(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURE... QUESTION",
            help="Pictures (paths, URLs, or - for standard input), then the question, in quotes.",
            show_default=False,
        ),
    ],
    video: Annotated[
        list[str] | None,
        typer.Option(
            "--video", metavar="FILE", help="Ask about a video (may be repeated).", rich_help_panel=_MEDIA
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames", min=1, help="Look at this many frames of a video at most.", rich_help_panel=_MEDIA
        ),
    ] = None,
    max_slices: Annotated[
        int | None,
        typer.Option(
            "--max-slices",
            min=1,
            rich_help_panel=_MEDIA,
            help="Cut a picture into this many slices at most: fewer is faster, more reads smaller text.",
        ),
    ] = None,
    model: ModelOption = None,
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    engine: EngineOption = "native",
    tensor_parallel_size: TensorParallelOption = 1,
    pipeline_parallel_size: PipelineParallelOption = 1,
    distributed_executor_backend: ExecutorOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    speculative_ngram: SpeculativeNgramOption = None,
    gpu_memory: GpuMemoryOption = None,
    system: Annotated[
        str | None,
        typer.Option("--system", help="A system message before the question.", rich_help_panel=_ANSWER),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", min=1, help="Tokens of the answer at most.", rich_help_panel=_ANSWER),
    ] = 1024,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="0 is greedy; higher is more varied.", rich_help_panel=_ANSWER),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Sample from this much probability.", rich_help_panel=_ANSWER),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Sample from this many tokens.", rich_help_panel=_ANSWER)
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p", help="Drop tokens below this share of the likeliest.", rich_help_panel=_ANSWER
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", help="Above 1 discourages repeating.", rich_help_panel=_ANSWER),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Sample the same way each time.", rich_help_panel=_ANSWER)
    ] = None,
    beam: Annotated[
        int | None,
        typer.Option(
            "--beam", min=1, help="Beam search of this width (3 is usual).", rich_help_panel=_ANSWER
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            rich_help_panel=_ANSWER,
            help="Print a JSON object: answer, token counts, time to first token, tokens a second.",
        ),
    ] = False,
) -> None:
    """Ask a question about pictures or a video; the answer is printed as it is generated.

    huoyan ask plane.jpg "请描述这张图片"
    huoyan ask before.png after.png "what changed?"
    huoyan ask --video clip.mp4 --frames 16 "what happens?"
    curl -s https://example.org/cat.jpg | huoyan ask - "what breed?"

    Greedy, unless --temperature, --top-p, --top-k or --min-p is given,
    or the model's own generation_config.json asks for sampling.
    """
    from huoyan.cli.question import split_arguments

    pictures, question = split_arguments(arguments, video or [])
    from huoyan.api.ask import ask_messages
    from huoyan.cli.models_option import open_llm

    llm = open_llm(
        model,
        quiet=as_json,
        hub=hub,
        revision=revision,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        speculative_config=speculative_config(speculative_ngram),
        gpu_memory=gpu_memory,
        max_num_seqs=max(beam or 1, 8),
        capture_at_start=False,
        engine=engine,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        distributed_executor_backend=distributed_executor_backend,
    )
    sampling = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    params = _params(llm, {k: v for k, v in sampling.items() if v is not None}, max_tokens, beam)
    media = [*(_standard_input() if name == "-" else name for name in pictures), *_videos(video or [])]
    wanted = {"max_slice_nums": max_slices, "max_frames": frames}
    kwargs = {name: value for name, value in wanted.items() if value is not None}
    outputs = llm.stream(ask_messages(media, question, system), params, mm_processor_kwargs=kwargs)
    if as_json or beam is not None:
        output = None
        for output in outputs:  # noqa: B007
            pass
        assert output is not None
        if as_json:
            _print_json(output, llm)
            return
        print(output.outputs[0].text)
    else:
        output = _print_stream(outputs)
    _print_speed(output)


def _params(llm: LLM, sampling: dict[str, Any], max_tokens: int, beam: int | None) -> SamplingParams:
    from huoyan.api.sampling_params import SamplingParams
    from huoyan.errors import InputError

    if beam is not None and beam > 1:
        if sampling:
            name = next(iter(sampling)).replace("_", "-")
            raise InputError(
                f"--beam searches for the likeliest answer and does not sample: leave --{name} out"
            )
        return SamplingParams(use_beam_search=True, best_of=beam, temperature=0.0, max_tokens=max_tokens)
    if beam is not None:
        sampling = {"temperature": 0.0, **sampling}
    if any(name in sampling for name in ("temperature", "top_p", "top_k", "min_p")):
        return SamplingParams(**{"temperature": 0.7, **sampling, "max_tokens": max_tokens})
    return SamplingParams.from_dict({**sampling, "max_tokens": max_tokens}, llm.asked_sampling())


def _videos(paths: list[str]) -> list[Any]:
    if not paths:
        return []
    from huoyan.media.video import Video

    return [Video.open(path) for path in paths]


def _standard_input() -> bytes:
    from huoyan.errors import MediaError

    data = sys.stdin.buffer.read()
    if not data:
        raise MediaError("standard input is empty: pipe a picture into it, or give a path")
    return data


def _print_stream(outputs: Any) -> RequestOutput:
    shown = ""
    output: RequestOutput | None = None
    for output in outputs:
        text = output.outputs[0].text if output.outputs else ""
        if len(text) > len(shown):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write("\n")
    assert output is not None
    return output


def speed(output: RequestOutput) -> dict[str, float | None]:
    """Seconds to the first token, and tokens a second after it."""
    metrics = output.metrics
    tokens = sum(len(answer.token_ids) for answer in output.outputs)
    if metrics is None or metrics.first_token_time is None or metrics.finished_time is None:
        return {"time_to_first_token": None, "tokens_per_second": None}
    seconds = metrics.finished_time - metrics.first_token_time
    return {
        "time_to_first_token": metrics.time_to_first_token,
        "tokens_per_second": (tokens - 1) / seconds if tokens > 1 and seconds > 0 else None,
    }


def _print_json(output: RequestOutput, llm: LLM) -> None:
    import json

    answer = output.outputs[0]
    numbers = {k: None if v is None else round(v, 4) for k, v in speed(output).items()}
    print(
        json.dumps(
            {
                "answer": answer.text,
                "model": llm.model,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": len(output.prompt_token_ids),
                "completion_tokens": len(answer.token_ids),
                **numbers,
            },
            ensure_ascii=False,
        )
    )


def _print_speed(output: RequestOutput) -> None:
    """On a terminal only: how long it took, and whether the answer was cut off."""
    if not sys.stderr.isatty():
        return
    from huoyan.cli.console import dim

    answer = output.outputs[0]
    parts = [f"{len(output.prompt_token_ids)} tokens in, {len(answer.token_ids)} out"]
    numbers = speed(output)
    if numbers["time_to_first_token"] is not None:
        parts.append(f"first after {numbers['time_to_first_token']:.2f} s")
    if numbers["tokens_per_second"] is not None:
        parts.append(f"{numbers['tokens_per_second']:.1f} tokens/s")
    if answer.finish_reason == "length":
        parts.append("cut off by --max-tokens")
    dim(", ".join(parts))
