"""The model card of `tiny`, written from the evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_INTRO = """\
---
license: apache-2.0
language: [zh, en]
pipeline_tag: image-text-to-text
library_name: huoyan
---

# tiny: a demonstration model

**This is a demonstration model.** It shows that the whole of huoyan works, from a picture to an answer, without a
download. It knows synthetic drawings and nothing else: do not use it for photographs, and do not judge MiniCPM-V by it.

`tiny` has {parameters:.1f} million parameters in exactly the layout of the published MiniCPM-V 2.6 checkpoints
(a SigLIP encoder for any grid of patches, a resampler of 64 queries, a Qwen2 decoder), with its own byte-level BPE
of 1024 tokens and slices of about 224 by 224 pixels. It was trained from scratch on drawings made by
`training/huoyan_training` in one command:

    python training/train_tiny.py --out DIR

It describes a drawn scene, says what, which colour, how many and where, reads a short printed word or number, tells two
pictures apart and says what moves in a few video frames, in Chinese and English.
"""


def model_card(report: Mapping[str, Any]) -> str:
    """Markdown from the contents of `eval.json`."""
    training = report.get("training", {})
    parts = [_INTRO.format(parameters=training.get("parameters", 0) / 1e6)]
    parts.append(_accuracies(report))
    if "slices" in report:
        parts.append(_slices(report["slices"]))
    titles = {"kind": "Kinds of things", "colour": "Colours", "count": "Numbers"}
    parts.append(
        "## Confusion tables\n\nHeld-out drawings; rows are what is drawn, columns what the answer says.\n"
    )
    for name, title in titles.items():
        table = report.get("confusion", {}).get(name)
        if table and table["labels"]:
            parts.append(f"### {title}\n\n{_matrix(table)}")
    parts.append(_limits(training))
    return "\n".join(parts)


def _accuracies(report: Mapping[str, Any]) -> str:
    heldout, unseen, goals = report.get("heldout", {}), report.get("unseen", {}), report.get("goals", {})
    lines = [
        "## Accuracy",
        "",
        "Greedy answers to generated questions, counted as right only if all words are (but for case, spaces and",
        "the final mark). A description's score (`describe`; `content` is of one of several pictures) is the share of",
        "its facts (things, colours, counts, places, backdrop, printed text) that agree with the drawing.",
        "*Held-out*: compositions and words never drawn in training. *Unseen*: pairs of kind and colour, counts of a",
        "kind, and neighbouring letters that training avoids altogether.",
        "",
        "| questions | goal | held-out | 中文 | English | n | unseen | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, row in heldout.items():
        other = unseen.get(task)
        goal = f"{100 * goals[task]:.0f} %" if task in goals else ""
        cells = [task, goal, *(_percent(row.get(name)) for name in ("accuracy", "zh", "en")), row["n"]]
        cells += [_percent(other["accuracy"]), other["n"]] if other else ["", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _slices(table: Mapping[str, Any]) -> str:
    lines = [
        "## Slices",
        "",
        "The same questions about large pictures, cut into slices as the rules say and seen as one overview only. The",
        "`slice` questions are about print and things too small for the overview.",
        "",
        "| questions | n | with slices | overview only |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {task} | {row['n']} | {_percent(row['with'])} | {_percent(row['without'])} |"
        for task, row in table.items()
    ]
    return "\n".join(lines) + "\n"


def _matrix(table: Mapping[str, Any]) -> str:
    columns = table["columns"]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for label, row in zip(table["labels"], table["matrix"], strict=True):
        lines.append(f"| **{label}** | " + " | ".join(str(n) if n else "" for n in row) + " |")
    return "\n".join(lines) + "\n"


def _limits(training: Mapping[str, Any]) -> str:
    text = (
        "## Limits\n\nIt answers in the words it was taught; any other question, and any photograph, gets an answer\n"
        "that means nothing. Counting ends at five, words at six characters.\n"
    )
    if training:
        run = (
            "The last run, which went on from an earlier one, took"
            if training.get("continued")
            else "Trained for"
        )
        text += (
            f"\n{run} {training['minutes']} minutes on {training['device']}: {training['steps']} steps, "
            f"{training['examples_drawn']} drawn examples, {training['examples_seen']} seen, seed {training['seed']}.\n"
        )
    return text


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
