"""The recipe's table: what it reported of a 4090, what `huoyan bench compare` measured, what a 4090 could do at most.

usage: python benchmarks/recipe_table.py compare.json [--vllm vs_vllm.json] [--write docs/performance.md]

`compare.json` is what `huoyan bench compare A B --gpu-memory 24GiB --json compare.json` wrote, 16 bits first, then
int4. The last two columns are predictions, nothing was run for them: time from the bytes and operations of the same job
by the data sheet's bandwidth and arithmetic (a limit: kernels and launches come on top), memory from `huoyan plan`.
`--write` puts the table between the marks in a page; without it it is printed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huoyan.bench.checkpoint_shapes import NAMED_SHAPES
from huoyan.bench.opened import folder_of
from huoyan.bench.requests import slice_patches
from huoyan.bench.rooflines import Ask, Rooflines
from huoyan.engine.config import EngineConfig
from huoyan.media.slicing import plan_slices
from huoyan.media.types import SliceRules
from huoyan.models.config import ModelConfig, read_model_config
from huoyan.models.costs import Speed, WeightFormat
from huoyan.planning.cards import find_card
from huoyan.planning.memory import memory
from huoyan.planning.shapes import published_shapes
from huoyan.planning.sizes import gib
from huoyan.planning.workspace import Way

BEGIN, END = "<!-- recipe table: begin -->", "<!-- recipe table: end -->"
RECIPE = {
    "input": ("113.63 tok/s", "172.64 tok/s"),
    "output": ("32.49 tok/s", "28.21 tok/s"),
    "time": ("12 s", "7 s"),
    "memory": ("16 GB", "7 GB"),
    "longest": ("2 048", "6 144"),
    "batch": ("2", "52"),
}
"""Of fp16 and int4, as published: one RTX 4090, vLLM 0.5.4, beams of 3."""
CARD = "RTX 4090"


@dataclass(frozen=True)
class Predicted:
    """What the card could do at most with one of the two."""

    seconds: float
    prompt: int
    answer: int
    model_bytes: int
    longest: int
    kv_tokens: int
    batch: int
    small_batch: int


def predicted(
    config: ModelConfig, int4: bool, asked: dict[str, Any], patches: list[int], length: int, beams: int
) -> Predicted:
    card = find_card(CARD)
    way = Way(itemsize=2, cuda=True, kernels=True)
    shapes = published_shapes(config)

    def fits(kv_dtype: str) -> tuple[int, int, int]:
        """(tokens, batch, bytes a token) with just so many seats."""
        for seats in range(16, 1025, 16):
            engine = EngineConfig(max_num_seqs=seats, kv_cache_dtype=kv_dtype)
            parts = memory(config, engine, way, shapes, int4=int4)
            blocks = parts.blocks_in(card.memory)
            count = blocks // -(-length // engine.block_size)
            if count <= seats:
                break
        return blocks * engine.block_size, count, parts.kv_token

    tokens, batch, kv_token = fits("auto")
    found = memory(config, EngineConfig(), way, shapes, int4=int4).weights.total
    weights = WeightFormat(2, 128 if int4 else None)
    lines = Rooflines(config, weights, kv_token, Speed(card.bandwidth, card.flops))
    ask = Ask(tuple(patches), asked["input_tokens"], asked["output_tokens"])
    seconds = lines.first_token(ask) + (ask.answer - 1) * lines.mean_step(ask, beams)
    context = config.text.max_position_embeddings
    return Predicted(
        seconds, ask.prompt, ask.answer, found, min(tokens, context), tokens, batch, fits("int8")[1]
    )


def table(compare: dict[str, Any], vllm: dict[str, Any] | None, config: ModelConfig) -> str:
    settings, models = compare["settings"], compare["models"]
    length, beams = settings["batch_length"], settings["beams"]
    plan = plan_slices(tuple(settings["picture_size"]), SliceRules())
    patches = slice_patches(plan, config.vision.patch_size)
    guessed = [
        predicted(config, int4, models[int4]["beams"], patches, length, beams) for int4 in (False, True)
    ]
    cap = settings["gpu_memory"]
    device = compare["device"].removeprefix("NVIDIA ")
    head = [
        "", "fp16, recipe", "int4, recipe", f"16 bits, {device} in {cap}", f"int4, {device} in {cap}",
        f"16 bits, {CARD} (predicted)", f"int4, {CARD} (predicted)",
    ]  # fmt: skip

    def rate(count: int, seconds: float) -> str:
        return f"{count / seconds:.4g} tok/s"

    asked = [column["beams"] for column in models]
    greedy = [column["greedy"] for column in models]
    rows = [
        [f"beams of {beams}: input", *RECIPE["input"], *(rate(a["input_tokens"], a["seconds"]) for a in asked),
         *(f"at most {rate(p.prompt, p.seconds)}" for p in guessed)],
        ["output", *RECIPE["output"], *(rate(a["output_tokens"], a["seconds"]) for a in asked),
         *(f"at most {rate(p.answer, p.seconds)}" for p in guessed)],
        [f"time, {asked[0]['output_tokens']} tokens (the recipe's are its own)", *RECIPE["time"],
         *(f"{a['seconds']:.3g} s" for a in asked), *(f"at least {p.seconds:.3g} s" for p in guessed)],
        ["greedy: output", "", "", *(rate(a["output_tokens"], a["seconds"]) for a in greedy), "", ""],
        ["greedy: first token", "", "", *(f"{1000 * a['first_token_s']:.3g} ms" for a in greedy), "", ""],
        ["memory of the model", *RECIPE["memory"], *(gib(m["model_bytes"]) for m in models),
         *(gib(p.model_bytes) for p in guessed)],
        ["tokens of the KV cache", "", "", *(_count(m["kv_tokens"]) for m in models),
         *(_count(p.kv_tokens) for p in guessed)],
        ["longest context, run", *RECIPE["longest"], *(_count(m["longest"]["proved"]) for m in models),
         *(_count(p.longest) for p in guessed)],
        [f"largest batch of {length} tokens, run", *RECIPE["batch"], *(_count(m["batch"]["proved"]) for m in models),
         *(_count(p.batch) for p in guessed)],
    ]  # fmt: skip
    if all(m.get("small") for m in models):
        small = [_count(m["small"]["batch"]["proved"]) for m in models]
        rows.append(
            ["the same, KV cache in 8 bits", "", "", *small, *(_count(p.small_batch) for p in guessed)]
        )
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    notes = [
        f"Measured on {compare['device']} inside {cap}; recipe: one RTX 4090, vLLM 0.5.4, as published. {CARD} "
        "(predicted): limits by its data sheet (1 008 GB/s, 165 TFLOP/s), the plan for 24 GiB; nothing was run."
    ]
    if vllm is not None:
        counts = [_vllm_tokens(vllm, kind) for kind in ("bf16", "int4")]
        if all(counts):
            shown = " / ".join(f"{_count(n)} ({n // length} of {length})" for n in counts)
            notes.append(
                f"vLLM beside it, tokens of the KV cache in 24 GiB, 16 bits / int4: {shown}, counted, not run."
            )
    return "\n".join([*lines, "", *notes])


def _vllm_tokens(report: dict[str, Any], kind: str) -> int:
    values = report.get("formats", {}).get(kind, {}).get("vllm", {}).get("values", {})
    return int(values.get("kv_in_24_GiB_tokens", 0))


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def write(page: Path, text: str) -> None:
    """Between the marks, which stay."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no {BEGIN} … {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("compare", type=Path)
    parser.add_argument("--vllm", type=Path, help="what benchmarks/vs_vllm.py wrote")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    args = parser.parse_args()
    with folder_of(next(iter(NAMED_SHAPES)), "dummy") as (folder, _):
        config = read_model_config(Path(folder))
    vllm = json.loads(args.vllm.read_text()) if args.vllm else None
    text = table(json.loads(args.compare.read_text()), vllm, config)
    if args.write:
        write(args.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
