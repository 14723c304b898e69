"""Greedy accuracy on examples training never saw: by task, language and split, with confusion tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tiny_trainer.drawing import HeldOut
from tiny_trainer.generate import Prompted
from tiny_trainer.scoring import exact, facts, score

Predict = Callable[[Sequence[Prompted]], list[list[str]]]
"""Answers to every prompt of every example."""

GOALS = {
    "what": 0.95, "colour": 0.95, "count": 0.95, "where": 0.95, "exists": 0.95,
    "word": 0.90, "two": 0.90, "motion": 0.90,
}  # fmt: skip


def evaluate(items: Sequence[HeldOut], predict: Predict) -> dict[str, Any]:
    """Everything `eval.json` says of a model's answers."""
    answers = predict([item.prompted for item in items])
    out: dict[str, Any] = {"goals": GOALS}
    for split in sorted({item.split for item in items}):
        out[split] = by_task(items, answers, split)
    out["confusion"] = {name: confusion(items, answers, name) for name in ("kind", "colour", "count")}
    cut = [(item, given) for item, given in zip(items, answers, strict=True) if item.one_slice is not None]
    if cut:
        without = predict([item.one_slice for item, _ in cut if item.one_slice is not None])
        out["slices"] = slices_matter([item for item, _ in cut], [given for _, given in cut], without)
    out["mistakes"] = mistakes(items, answers)
    return out


def by_task(items: Sequence[HeldOut], answers: Sequence[Sequence[str]], split: str) -> dict[str, Any]:
    """{task: {accuracy, n, zh, en, exact}}; for descriptions `accuracy` is the share of right facts."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, given in zip(items, answers, strict=True):
        if item.split != split:
            continue
        for answer, (_, reference), task, language in zip(
            given, item.turns, item.tasks, item.languages, strict=True
        ):
            value = score(task, language, answer, reference)
            scores[task]["accuracy"].append(value)
            scores[task][language].append(value)
            scores[task]["exact"].append(float(exact(answer, reference)))
    return {
        task: {
            "n": len(kinds["accuracy"]),
            **{name: round(_mean(values), 4) for name, values in kinds.items()},
        }
        for task, kinds in sorted(scores.items())
    }


def by_family(items: Sequence[HeldOut], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy of the questions of each family's examples."""
    scores: dict[str, list[float]] = defaultdict(list)
    for item, given in zip(items, answers, strict=True):
        # The first turn is the family's own question; there may be more of them, beside common single-picture tasks.
        for answer, (_, reference), task, language in zip(
            given, item.turns, item.tasks, item.languages, strict=True
        ):
            if task == item.tasks[0]:
                scores[item.family].append(score(task, language, answer, reference))
    return {family: _mean(values) for family, values in scores.items()}


def slices_matter(
    items: Sequence[HeldOut], cut: Sequence[Sequence[str]], whole: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """{task: {n, with, without}}: the same questions about large pictures, cut as the rules say and not cut."""
    scores: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for item, one, other in zip(items, cut, whole, strict=True):
        rows = zip(one, other, item.turns, item.tasks, item.languages, strict=True)
        for with_slices, without, (_, reference), task, language in rows:
            scores[task][0].append(score(task, language, with_slices, reference))
            scores[task][1].append(score(task, language, without, reference))
    return {
        task: {"n": len(a), "with": round(_mean(a), 4), "without": round(_mean(b), 4)}
        for task, (a, b) in sorted(scores.items())
    }


def confusion(items: Sequence[HeldOut], answers: Sequence[Sequence[str]], what: str) -> dict[str, Any]:
    """{labels, matrix}: rows are what is drawn, columns what the answer says; "other" is none of them.

    Kinds are read from answers to "what", colours from "colour", numbers from "count", of the held-out split.
    """
    task = "what" if what == "kind" else what
    pairs: Counter[tuple[str, str]] = Counter()
    for item, given in zip(items, answers, strict=True):
        if item.split != "heldout":
            continue
        for answer, (_, reference), asked, language in zip(
            given, item.turns, item.tasks, item.languages, strict=True
        ):
            if asked == task and (row := named(reference, language, what)) is not None:
                pairs[row, named(answer, language, what) or "other"] += 1
    labels = sorted({row for row, _ in pairs} | {column for _, column in pairs} - {"other"})
    columns = [*labels, "other"]
    return {"labels": labels, "columns": columns, "matrix": [[pairs[r, c] for c in columns] for r in labels]}


def named(text: str, language: str, what: str) -> str | None:
    """The one kind, colour or number that a short answer names, None for none or several."""
    from tiny_trainer.scoring import words_named

    if what == "kind":
        found = {fact[1] for fact in facts(text, language) if fact[0] == "kind"} or words_named(
            text, language, what
        )
    else:
        found = words_named(text, language, what)
    return found.pop() if len(found) == 1 else None


def mistakes(
    items: Sequence[HeldOut], answers: Sequence[Sequence[str]], each: int = 6
) -> dict[str, list[list[str]]]:
    """A few wrong answers of each task: [question, reference, answer]."""
    out: dict[str, list[list[str]]] = defaultdict(list)
    for item, given in zip(items, answers, strict=True):
        for answer, (question, reference), task in zip(given, item.turns, item.tasks, strict=True):
            if len(out[task]) < each and not exact(answer, reference):
                out[task].append([question, reference, answer])
    return dict(out)


def summary(report: Mapping[str, Any]) -> str:
    """One line for each split."""
    lines = []
    for split in ("heldout", "unseen"):
        parts = [
            f"{task} {100 * row['accuracy']:.1f}{'' if row['accuracy'] >= GOALS.get(task, 0) else '!'}"
            for task, row in report.get(split, {}).items()
        ]
        lines.append(f"{split}: " + "  ".join(parts))
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
