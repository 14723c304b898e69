"""The results of vs_vllm.py as a table and a chart: parts that ran in separate commands are joined here.

usage: python benchmarks/vs_vllm_report.py DIR [--markdown FILE] [--chart FILE]

DIR holds what `vs_vllm.py --out DIR` wrote: ENGINE-FORMAT.json, and ENGINE-FORMAT-memory.json, whose number stands
before the derived one. Without --markdown the table goes to standard output. Ratios are above 1 where huoyan is the
better.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

Found = dict[str, dict[str, dict[str, Any]]]
"""By format, then by engine: values, prompts, notes, failed, device."""
ENGINES = ("vllm", "huoyan")
FORMS = {"bf16": "bf16", "int4": "int4 (AWQ)"}
LABELS: tuple[tuple[str, str], ...] = (
    (r"ready_s", "start to first answer, s"),
    (r"decode_1_tok_s", "decode, 1 sequence, tok/s"),
    (r"decode_(\d+)_tok_s", r"decode, \1 sequences, tok/s"),
    (r"beam3_step_ms", "a step of 3 beams behind a picture, ms"),
    (r"beam3_(\d+)_tokens_total_s", r"one picture, 3 beams, \1 tokens, s"),
    (r"text_(\d+)_first_token_ms", r"first token, \1 tokens of text, ms"),
    (r"picture_(\d+)x(\d+)_first_token_ms", r"first token, a picture of \1×\2, ms"),
    (r"four_pictures_first_token_ms", "first token, four pictures of 1344×896, ms"),
    (r"video_(\d+)x(\d+)x(\d+)_first_token_ms", r"first token, video of \1 frames \2×\3, ms"),
    (r"(\d+)_pictures_req_s", r"\1 requests, each a picture and 128 tokens, req/s"),
    (r"kv_in_(\w+)_GiB_tokens", r"KV cache inside \1 GiB, tokens"),
)
"""In the order of the table."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--chart", type=Path)
    given = parser.parse_args()
    found = collect(given.folder)
    if not found:
        parser.error(f"{given.folder} has no results of vs_vllm.py")
    table = markdown(found)
    if given.markdown:
        given.markdown.write_text(table, encoding="utf-8")
    else:
        print(table, end="")
    if given.chart:
        draw(found, given.chart)
    return 0


def collect(folder: Path) -> Found:
    """All parts in a folder, in the order of `FORMS`."""
    found: Found = {}
    for form in FORMS:
        for engine in ENGINES:
            parts = [folder / f"{engine}-{form}{part}.json" for part in ("", "-memory")]
            there = [json.loads(path.read_text()) for path in parts if path.exists()]
            if there:
                found.setdefault(form, {})[engine] = join(there)
    return found


def join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One engine's parts; a later one's numbers replace an earlier one's, and the notes to them."""
    first, *others = (json.loads(json.dumps(part)) for part in parts)
    for part in others:
        first["device"] = first["device"] or part["device"]
        for name in part["values"]:
            first["notes"].pop(name, None)
        for field in ("values", "prompts", "notes", "failed"):
            first[field].update(part[field])
    return first


def faster(name: str) -> bool:
    """Whether more is better."""
    return name.endswith(("tok_s", "req_s", "GiB_tokens"))


def ratios(found: Found) -> dict[str, dict[str, float]]:
    """huoyan to vLLM, above 1 where huoyan is the better, in the order of the table."""
    result: dict[str, dict[str, float]] = {}
    for form, engines in found.items():
        theirs, ours = (engines.get(engine, {}).get("values", {}) for engine in ENGINES)
        result[form] = {
            name: ours[name] / theirs[name] if faster(name) else theirs[name] / ours[name]
            for name in ordered([theirs])
            if name in ours and theirs[name] > 0 and ours[name] > 0
        }
    return result


def ordered(values: list[dict[str, float]]) -> list[str]:
    """All names, as `LABELS` has them."""
    names = list(dict.fromkeys(name for each in values for name in each))
    return sorted(names, key=lambda name: (_place(name), [int(n) for n in re.findall(r"\d+", name)]))


def _place(name: str) -> int:
    return next((i for i, (form, _) in enumerate(LABELS) if re.fullmatch(form, name)), len(LABELS))


def label(name: str) -> str:
    for form, text in LABELS:
        if re.fullmatch(form, name):
            return re.sub(form, text, name)
    return name


def problems(found: Found) -> list[str]:
    """What must be told with the numbers: rows that failed, work or devices that are not the same."""
    told = []
    for form, engines in found.items():
        for engine, results in engines.items():
            told += [f"{form}, {engine}, {row}: {reason}" for row, reason in results["failed"].items()]
        if len(engines) < len(ENGINES):
            continue
        theirs, ours = (engines[engine] for engine in ENGINES)
        for field in ("device", "sizes", "shape", "dummy"):
            if theirs[field] != ours[field]:
                told.append(
                    f"{form}: not the same {field}: {theirs[field]} for vLLM, {ours[field]} for huoyan"
                )
        for name, count in theirs["prompts"].items():
            own = ours["prompts"].get(name, count)
            if own != count:
                told.append(
                    f"{form}, {name}: prompts of {count} tokens in vLLM and {own} here: not the same work"
                )
    return told


def print_table(found: Found) -> None:
    each = ratios(found)
    for form, engines in found.items():
        print(f"\n{form:36} {'vLLM':>12} {'huoyan':>12} {'ratio':>8}")
        sides = [engines.get(engine, {}).get("values", {}) for engine in ENGINES]
        for name in ordered(sides):
            cells = [f"{side[name]:12.2f}" if name in side else f"{'-':>12}" for side in sides]
            ratio = f"{each[form][name]:8.2f}" if name in each[form] else f"{'-':>8}"
            print(f"{name:36} {' '.join(cells)} {ratio}")
    for line in problems(found):
        print(f"  {line}")


def markdown(found: Found) -> str:
    """The table of docs/performance.md, with what must be told below it."""
    each = ratios(found)
    heads = [f"{FORMS[form]}: {side}" for form in found for side in ("vLLM", "huoyan", "ratio")]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    sides = [engines.get(engine, {}).get("values", {}) for engines in found.values() for engine in ENGINES]
    for name in ordered(sides):
        cells = []
        for form, engines in found.items():
            for engine in ENGINES:
                values = engines.get(engine, {}).get("values", {})
                cells.append(number(values[name]) if name in values else "–")
            cells.append(f"{each[form][name]:.2f}" if name in each[form] else "–")
        lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
    notes = {
        f"{label(name)}: {text}"
        for e in found.values()
        for r in e.values()
        for name, text in r["notes"].items()
    }
    devices = {results["device"] for engines in found.values() for results in engines.values()} - {""}
    toy = any(results["toy"] for engines in found.values() for results in engines.values())
    below = [f"Device: {', '.join(sorted(devices))}."]
    below += ["TOY SIZES: these numbers say that the script works, and nothing else."] if toy else []
    below += [f"{note}." for note in sorted(notes)] + [f"{line}." for line in problems(found)]
    return "\n".join([*lines, "", *below, ""])


def number(value: float) -> str:
    """Three digits that count, thousands apart by spaces."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def draw(found: Found, target: Path) -> None:
    """A bar a row and format: huoyan's ratio to vLLM."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: matplotlib is not installed")
        return
    forms = {form: values for form, values in ratios(found).items() if values}
    if not forms:
        return
    names = ordered(list(forms.values()))
    figure = Figure(figsize=(9, 1.1 + 0.2 * len(names) * len(forms)), layout="constrained")
    axes = figure.subplots()
    # By factors, so that half as fast is as long as twice as fast, and beams do not dwarf the others.
    axes.set_xscale("log", base=2)
    height = 0.8 / len(forms)
    colours = ("#30638e", "#edae49")
    for i, (form, values) in enumerate(forms.items()):
        places = [at + i * height for at, name in enumerate(names) if name in values]
        shown = [values[name] for name in names if name in values]
        axes.barh(places, [v - 1 for v in shown], height * 0.92, left=1, label=FORMS[form], color=colours[i])
        for at, value in zip(places, shown, strict=True):
            side = "left" if value >= 1 else "right"
            axes.annotate(
                f"{value:.2f}", (value, at), (4 if value >= 1 else -4, 0), textcoords="offset points",
                va="center", ha=side, fontsize=8,
            )  # fmt: skip
    middle = height * (len(forms) - 1) / 2
    # A ratio has no unit.
    words = [re.sub(r", (ms|s|tok/s|req/s|tokens)$", "", label(name)) for name in names]
    axes.set_yticks([at + middle for at in range(len(names))], words, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    toy = any(results["toy"] for engines in found.values() for results in engines.values())
    devices = {results["device"] for engines in found.values() for results in engines.values()} - {""}
    title = f"huoyan to vLLM on one {', '.join(sorted(devices))}: 1 is equal, to the right huoyan is better"
    figure.suptitle(("TOY SIZES: " if toy else "") + title, fontsize=10, x=0.01, ha="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(frameon=False, loc="best", fontsize=9)
    figure.savefig(target, dpi=150)
    print(f"chart: {target}")


if __name__ == "__main__":
    sys.exit(main())
