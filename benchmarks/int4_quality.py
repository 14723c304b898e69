"""What four bits cost `tiny`: accuracy of every task, perplexity and agreement, by the way of quantizing.

    python benchmarks/int4_quality.py [--examples 12] [--group-size 64] [--only WAYS] [--also NAME=FOLDER]

Questions are held-out drawings of the training generator (see training/evaluate.py), asked through `LLM.chat`.
Perplexity and agreement are over the reference answers of the same questions, by the model's own logits;
"same answer" is the share of questions that get the 16-bit model's answer to the letter. In brackets stands the
difference from 16 bits with its standard error: differences are taken question by question, and the questions about
one drawing count as one draw.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / "training"), str(_ROOT / "src")]

FAMILIES = ("describe", "what", "colour", "count", "where", "exists", "word", "two", "three", "slice", "chat")


@dataclass
class Asked:
    """One held-out question."""

    pictures: list[Any]
    question: str
    reference: str
    task: str
    language: str
    drawing: int
    """Which example of the generator it is about."""


WAYS: dict[str, dict[str, Any]] = {
    "AWQ": {},
    "AWQ compensated": {"compensate": True},
    "rounding": {"method": "rtn"},
    "AWQ compensated, int8 head": {"compensate": True, "quantize_head": "int8"},
}
"""Columns, and how each is quantized."""


@dataclass
class Measured:
    """What one checkpoint does with all of them."""

    name: str
    answers: list[str]
    scores: dict[str, list[float]] = field(default_factory=dict)
    loss: float = 0.0
    best: list[Any] = field(default_factory=list)
    count: int = 0


def questions(examples: int, first: int) -> list[Asked]:
    """`examples` drawings of each family, with all their questions; the seeds are those of evaluate.py."""
    import numpy as np

    from evaluate import jobs
    from huoyan_training.families import FAMILIES as ALL
    from huoyan_training.families import sample

    out = []
    for seed, family, split in jobs(list(ALL), examples, first):
        if split != "heldout" or family not in FAMILIES:
            continue
        example = sample(np.random.default_rng(seed), family, split)
        for (question, answer), task, language in zip(
            example.turns, example.tasks, example.languages, strict=True
        ):
            out.append(Asked(list(example.pictures), question, answer, task, language, seed))
    return out


def made(
    ways: Sequence[str], model: str, scratch: Path, group_size: int, items: int
) -> list[tuple[str, str]]:
    """(way, folder) of `model` quantized in each way with one calibration set."""
    from huoyan.quantize.run import quantize
    from make_calibration import write

    lines = write(scratch / "calibration", items) if ways else None
    out = []
    for i, name in enumerate(ways):
        folder = scratch / str(i)
        quantize(model, folder, group_size=group_size, calibration=lines, device="cpu", **WAYS[name])
        out.append((name, str(folder)))
    return out


def measure(name: str, folder: str, asked: list[Asked]) -> Measured:
    """Answers through the engine, scores by task, and the logits of the references."""
    from huoyan import LLM, Picture, SamplingParams
    from tiny_trainer.scoring import score

    conversations = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": Picture(p)} for p in a.pictures),
                    {"type": "text", "text": a.question},
                ],
            }
        ]
        for a in asked
    ]
    with LLM(folder, device="cpu", max_model_len=2048, max_num_seqs=32) as llm:
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=96), use_tqdm=False)
    out = Measured(name, [output.outputs[0].text for output in outputs])
    scores: dict[str, list[float]] = defaultdict(list)
    for a, answer in zip(asked, out.answers, strict=True):
        scores[a.task].append(score(a.task, a.language, answer, a.reference))
    out.scores = dict(sorted(scores.items()))
    _logits(out, folder, asked)
    return out


def _logits(out: Measured, folder: str, asked: list[Asked]) -> None:
    import torch

    from huoyan import Picture
    from huoyan.models.checkpoint import open_checkpoint
    from huoyan.models.hub import resolve_model
    from huoyan.models.weights import load_model
    from huoyan.prompt.processor import PromptProcessor
    from huoyan.quantize.calibration import CalibrationItem, embed_items, encode_items
    from huoyan.quantize.causal import CausalAttention

    path = resolve_model(folder)
    model = load_model(open_checkpoint(path), dtype="float32")
    processor = PromptProcessor.from_folder(path)
    items = [CalibrationItem(a.question, tuple(Picture(p) for p in a.pictures), a.reference) for a in asked]
    with torch.inference_mode():
        for item in encode_items(items, processor, 2048):
            (one,) = embed_items([item], model)
            assert one.embeddings is not None
            length = len(one.token_ids)
            hidden = model.decoder(one.embeddings, torch.arange(length), CausalAttention([length]))
            logits = model.logits(hidden[one.answer_start - 1 : -1])
            targets = torch.tensor(one.token_ids[one.answer_start :])
            out.loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            out.count += len(targets)
            out.best.append(logits.argmax(-1))


def paired(mine: list[float], first: list[float], drawings: list[int]) -> tuple[float, float]:
    """Mean difference of two columns' scores and its standard error, in points."""
    differences = [100 * (a - b) for a, b in zip(mine, first, strict=True)]
    mean = sum(differences) / len(differences)
    clusters: dict[int, float] = defaultdict(float)
    for difference, drawing in zip(differences, drawings, strict=True):
        clusters[drawing] += difference - mean
    return mean, sum(total**2 for total in clusters.values()) ** 0.5 / len(differences)


def score_rows(columns: Sequence[Any], asked: list[Asked], tasks: list[str]) -> list[list[str]]:
    """The head of a table, a row for each task and one for all.

    `columns` have a `name` and `scores` by task; the others' differences are to the first, in 16 bits.
    """
    first = columns[0]
    drawings: dict[str, list[int]] = defaultdict(list)
    for a in asked:
        drawings[a.task].append(a.drawing)
    rows = [["", "n", *(c.name for c in columns)]]
    for name, group in [*((task, [task]) for task in tasks), ("all", tasks)]:
        where = [d for task in group for d in drawings[task]]
        cells = []
        for c in columns:
            own, reference = ([s for task in group for s in which.scores[task]] for which in (c, first))
            cell = f"{100 * sum(own) / len(own):.1f} %"
            if c is not first:
                cell += " ({:+.1f} ± {:.1f})".format(*paired(own, reference, where))
            cells.append(cell)
        rows.append([name, str(len(where)), *cells])
    return rows


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def table(measured: list[Measured], asked: list[Asked]) -> str:
    """Markdown, the first column of numbers being 16 bits."""
    import math

    import torch

    first = measured[0]
    rows = score_rows(measured, asked, list(first.scores))
    rows.append(["perplexity", str(first.count), *(f"{math.exp(m.loss / m.count):.5f}" for m in measured)])
    mine = torch.cat(first.best)
    agree = [float((torch.cat(m.best) == mine).float().mean()) for m in measured]
    rows.append(["token agreement", str(first.count), *(f"{100 * a:.2f} %" for a in agree)])
    same = [sum(a == b for a, b in zip(m.answers, first.answers, strict=True)) for m in measured]
    rows.append(
        ["same answer", str(len(first.answers)), *(f"{100 * s / len(first.answers):.1f} %" for s in same)]
    )
    return markdown(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="tiny")
    p.add_argument("--examples", type=int, default=12, help="drawings of each family")
    p.add_argument("--first", type=int, default=0, help="number of the first drawing")
    p.add_argument("--group-size", type=int, default=64)
    p.add_argument("--only", help=f"some columns, separated by semicolons, of: {'; '.join(WAYS)}")
    p.add_argument("--items", type=int, default=64, help="calibration items")
    p.add_argument(
        "--also", action="append", default=[], metavar="NAME=FOLDER", help="a further int4 checkpoint"
    )
    a = p.parse_args()
    begin = time.monotonic()
    asked = questions(a.examples, a.first)
    with tempfile.TemporaryDirectory() as scratch:
        ways = a.only.split(";") if a.only else list(WAYS)
        named = made(ways, a.model, Path(scratch), a.group_size, a.items)
        measured = [measure(name, folder, asked) for name, folder in [("16 bits", a.model), *named]]
        for name, _, path in (also.partition("=") for also in a.also):
            measured.append(measure(name, path, asked))
    print(table(measured, asked))
    print(f"\ngroups of {a.group_size}; {len(asked)} questions; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
