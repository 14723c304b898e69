"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

DEFAULT_MODEL = "openbmb/MiniCPM-V-2_6"
_PANEL = "The model"

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m",
        metavar="NAME",
        help=f"A folder, a hub name (downloaded once), or tiny; default $HUOYAN_MODEL, else {DEFAULT_MODEL}.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]  # fmt: skip
HubOption = Annotated[
    str,
    typer.Option(
        "--hub", help="Where hub names come from: huggingface or modelscope.", rich_help_panel=_PANEL
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option("--revision", help="A branch, tag or commit of the hub's model.", rich_help_panel=_PANEL),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=_PANEL)
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16.", rich_help_panel=_PANEL)
]
KVCacheDtypeOption = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype", rich_help_panel=_PANEL,
        help="auto (exact), or int8 or fp8: room for almost twice the tokens, answers nearly the same.",
    ),
]  # fmt: skip
SpeculativeNgramOption = Annotated[
    int | None,
    typer.Option(
        "--speculative-ngram", min=1, metavar="TOKENS", rich_help_panel=_PANEL, show_default=False,
        help="Guess so many tokens at once from what was said before: the same answers, sooner where they repeat.",
    ),
]  # fmt: skip
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(
        "--max-model-len", min=1, rich_help_panel=_PANEL,
        help="Tokens of question and answer together at most; lower takes less memory.",
    ),
]  # fmt: skip
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine", rich_help_panel=_PANEL,
        help="native, vllm, or auto: native on one device, vLLM where one model takes several.",
    ),
]  # fmt: skip
TensorParallelOption = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size", min=1, rich_help_panel=_PANEL,
        help="GPUs that share each layer of the model (vLLM only).",
    ),
]  # fmt: skip
PipelineParallelOption = Annotated[
    int,
    typer.Option(
        "--pipeline-parallel-size", min=1, rich_help_panel=_PANEL,
        help="GPUs, or groups of them, that share the layers out (vLLM only).",
    ),
]  # fmt: skip
ExecutorOption = Annotated[
    str | None,
    typer.Option(
        "--distributed-executor-backend", metavar="NAME", rich_help_panel=_PANEL, show_default=False,
        help="How vLLM runs on several GPUs: mp (processes of this machine, its default) or ray (of several).",
    ),
]  # fmt: skip
GpuMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory", metavar="SIZE", rich_help_panel=_PANEL, show_default=False,
        help="Take no more than this, such as 24GiB; without it nine tenths of the card.",
    ),
]  # fmt: skip


def speculative_config(tokens: int | None) -> dict[str, Any] | None:
    """What `--speculative-ngram` asks of `LLM`."""
    if tokens is None:
        return None
    return {
        "method": "ngram",
        "num_speculative_tokens": tokens,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
