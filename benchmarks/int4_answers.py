"""What four bits cost `tiny`, over thousands of questions: only the decoder differs, so pictures are encoded once.

    python benchmarks/int4_answers.py [NAME=CHECKPOINT …] [--ways WAYS] [--examples 100] [--first 0] [--seconds 600]

The first column is `tiny` in 16 bits; then come the ways of `int4_quality.py`, made here, and checkpoints that are
there already. Questions are held-out drawings as in `int4_quality.py`. One pass over the reference answers gives
perplexity, the divergence and agreement of tokens, and whether the answer is right: where the likeliest token is the
reference's at every position, greedy decoding would have said it. Descriptions that are not the reference word for
word are decoded greedily and scored by their facts. All in float32. In brackets: difference from 16 bits with its
standard error, taken question by question; the questions about one drawing count as one draw. Below the perplexity
stands how much more a token loses than in 16 bits, and than in the first column after it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, scaled_dot_product_attention

from int4_quality import FAMILIES, WAYS, Asked, made, markdown, questions, score_rows


@dataclass
class Column:
    """One checkpoint and what it did."""

    name: str
    model: Any
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    losses: list[float] = field(default_factory=list)
    """Of each question's reference answer, in nats."""
    divergence: float = 0.0
    agreed: int = 0
    same: int = 0


class Remembering:
    """Attention of a few sequences that keeps their keys and values."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        first = layer not in self.kept
        kept = self.kept.setdefault(layer, [])
        begin = 0
        for i, n in enumerate(self.lengths if first else [1] * len(self.lengths)):
            one_q, one_k, one_v = (t[begin : begin + n].transpose(0, 1) for t in (q, k, v))
            begin += n
            if first:
                kept.append((one_k, one_v))
            else:
                kept[i] = (torch.cat((kept[i][0], one_k), 1), torch.cat((kept[i][1], one_v), 1))
            keys, values = kept[i]
            one = scaled_dot_product_attention(
                one_q[None], keys[None], values[None], is_causal=first, enable_gqa=True
            )
            out.append(one[0].transpose(0, 1))
        return torch.cat(out)


def greedy(model: Any, prompts: list[Tensor], end: int, most: int = 96) -> list[list[int]]:
    """Tokens that follow embeddings, up to `end`."""
    lengths = [len(p) for p in prompts]
    attend = Remembering(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])
    hidden = model.decoder(torch.cat(prompts), positions, attend)
    last = torch.tensor(lengths).cumsum(0) - 1
    out: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    at = torch.tensor(lengths)
    hidden = hidden[last]
    for _ in range(most):
        best = model.logits(hidden).argmax(-1)
        for i, token in enumerate(best.tolist()):
            ended[i] = ended[i] or token == end
            if not ended[i]:
                out[i].append(token)
        if all(ended):
            break
        hidden = model.decoder(model.embed(best), at, attend)
        at = at + 1
    return out


class Branches:
    """Attention of packed trees: a beginning, then endings that each see the beginning and their own past."""

    def __init__(self, trees: list[tuple[int, list[int]]]) -> None:
        self.masks = []
        for beginning, endings in trees:
            mask = torch.zeros(beginning + sum(endings), beginning + sum(endings), dtype=torch.bool)
            mask[:, :beginning] = True
            at = beginning
            for n in endings:
                mask[at : at + n, at : at + n] = True
                at += n
            self.masks.append(mask.tril())

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = [len(mask) for mask in self.masks]
        pieces = zip(
            self.masks, *(t.transpose(0, 1)[None].split(sizes, dim=2) for t in (q, k, v)), strict=True
        )
        outs = (
            scaled_dot_product_attention(*one, attn_mask=mask, enable_gqa=True)[0] for mask, *one in pieces
        )
        return torch.cat([out.transpose(0, 1) for out in outs])


def encoded_items(model: Any, asked: list[Asked], processor: Any) -> list[Any]:
    """What the decoder sees of each question; the pictures of a drawing are encoded once."""
    from huoyan import Picture
    from huoyan.quantize.calibration import CalibrationItem, encode_items

    pictures: dict[Any, Any] = {}
    items = []
    for a in asked:
        one = CalibrationItem(a.question, tuple(Picture(p) for p in a.pictures), a.reference)
        ((item, slots, prepared),) = encode_items([one], processor, 2048)
        x = model.embed(torch.tensor(item.token_ids))
        for number, (slot, picture) in enumerate(zip(slots, prepared, strict=True)):
            if (a.drawing, number) not in pictures:
                pictures[a.drawing, number] = model.encode_slices(picture.slices)
            for offset, piece in zip(slot.offsets, pictures[a.drawing, number], strict=True):
                x[offset : offset + slot.length] = piece
        item.embeddings = x
        items.append(item)
    return items


def packed(items: list[Any], drawings: list[int]) -> tuple[Tensor, Tensor, Branches, Tensor]:
    """Embeddings, positions and attention of all items, where those about one drawing, which come together, share
    how they begin; then the rows that foretell answers, item by item."""
    parts: list[Tensor] = []
    positions: list[Tensor] = []
    rows: list[Tensor] = []
    trees: list[tuple[int, list[int]]] = []
    at = 0
    for drawing in dict.fromkeys(drawings):
        own = [item for item, d in zip(items, drawings, strict=True) if d == drawing]
        same = min(item.answer_start for item in own) - 1
        while any(item.token_ids[:same] != own[0].token_ids[:same] for item in own):
            same -= 1
        parts.append(own[0].embeddings[:same])
        positions.append(torch.arange(same))
        at += same
        for item in own:
            n = len(item.token_ids)
            parts.append(item.embeddings[same:])
            positions.append(torch.arange(same, n))
            rows.append(torch.arange(item.answer_start - 1, n - 1) + (at - same))
            at += n - same
        trees.append((same, [len(item.token_ids) - same for item in own]))
    return torch.cat(parts), torch.cat(positions), Branches(trees), torch.cat(rows)


def take(columns: list[Column], asked: list[Asked], processor: Any) -> None:
    """Ask a few questions of all columns."""
    from tiny_trainer.scoring import DESCRIPTIONS, score

    items = encoded_items(columns[0].model, asked, processor)
    x, positions, attend, rows = packed(items, [a.drawing for a in asked])
    counts = [len(i.token_ids) - i.answer_start for i in items]
    targets = torch.cat([torch.tensor(i.token_ids[i.answer_start :]) for i in items])
    end = processor.tokenizer.token_to_id("<|im_end|>")
    base: Tensor | None = None
    for column in columns:
        hidden = column.model.decoder(x, positions, attend)
        logs = log_softmax(column.model.logits(hidden[rows]).float(), -1)
        if base is None:
            base = logs
        best = logs.argmax(-1)
        lost = cross_entropy(logs, targets, reduction="none")
        column.losses += [float(part.sum()) for part in lost.split(counts)]
        column.divergence += float(kl_div(logs, base, reduction="sum", log_target=True))
        column.agreed += int((best == base.argmax(-1)).sum())
        right = [bool(r.all()) for r in (best == targets).split(counts)]
        column.same += sum(bool(s.all()) for s in (best == base.argmax(-1)).split(counts))
        loose = [i for i, a in enumerate(asked) if not right[i] and a.task in DESCRIPTIONS]
        said: dict[int, str] = {}
        if loose:
            prompts = [items[i].embeddings[: items[i].answer_start] for i in loose]
            for i, tokens in zip(loose, greedy(column.model, prompts, end), strict=True):
                said[i] = processor.tokenizer.decode(tokens)
        for i, a in enumerate(asked):
            value = score(a.task, a.language, said[i], a.reference) if i in said else float(right[i])
            column.scores[a.task].append(value)


def loss_difference(column: Column, other: Column, asked: list[Asked], tokens: int) -> str:
    """How much more a token loses in `column` than in `other`, in 1e-5 nats, with its standard error."""
    if column is other:
        return ""
    drawings: dict[int, list[float]] = defaultdict(list)
    for a, mine, first in zip(asked, column.losses, other.losses, strict=True):
        drawings[a.drawing].append(mine - first)
    more = sum(map(sum, drawings.values())) / len(asked)
    error = sum(sum(d - more for d in own) ** 2 for own in drawings.values()) ** 0.5
    return f"{1e5 * more * len(asked) / tokens:+.0f} ± {1e5 * error / tokens:.0f}"


def table(columns: list[Column], asked: list[Asked], tokens: int) -> str:
    """Markdown, the first column of numbers being 16 bits."""
    rows = score_rows(columns, asked, sorted(columns[0].scores))
    rows.append(["perplexity", str(tokens), *(f"{math.exp(sum(c.losses) / tokens):.5f}" for c in columns)])
    for other in columns[:2]:
        more = (loss_difference(c, other, asked, tokens) for c in columns)
        rows.append([f"1e-5 nats more than {other.name}", str(tokens), *more])
    rows.append(["divergence", str(tokens), *(f"{c.divergence / tokens:.2e}" for c in columns)])
    rows.append(["token agreement", str(tokens), *(f"{100 * c.agreed / tokens:.2f} %" for c in columns)])
    rows.append(["same tokens", str(len(asked)), *(f"{100 * c.same / len(asked):.1f} %" for c in columns)])
    return markdown(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", nargs="*", metavar="NAME=CHECKPOINT")
    p.add_argument("--ways", default="", help=f"made first, separated by semicolons: {'; '.join(WAYS)}")
    p.add_argument("--items", type=int, default=64, help="calibration items of the ways")
    p.add_argument("--group-size", type=int, default=64, help="of the ways")
    p.add_argument("--model", default="tiny")
    p.add_argument("--examples", type=int, default=100, help="drawings of each family")
    p.add_argument("--first", type=int, default=0, help="number of the first drawing")
    p.add_argument("--families", default=",".join(FAMILIES), help="of questions, separated by commas")
    p.add_argument("--seconds", type=float, default=600, help="ask no more when these are over")
    a = p.parse_args()
    from huoyan.models.checkpoint import open_checkpoint
    from huoyan.models.hub import resolve_model
    from huoyan.models.weights import load_model
    from huoyan.prompt.processor import PromptProcessor
    from huoyan_training.families import FAMILIES as ALL

    numbers = [list(ALL).index(family) for family in a.families.split(",")]
    named = [("16 bits", a.model), *((n, path) for n, _, path in (c.partition("=") for c in a.checkpoints))]
    with tempfile.TemporaryDirectory() as scratch:
        ways = [way for way in a.ways.split(";") if way]
        named[1:1] = made(ways, a.model, Path(scratch), a.group_size, a.items)
        columns = [
            Column(name, load_model(open_checkpoint(resolve_model(path)), dtype="float32"))
            for name, path in named
        ]
    begin = time.monotonic()
    processor = PromptProcessor.from_folder(resolve_model(a.model))
    asked: list[Asked] = []
    tokens = 0
    for drawing in range(a.first, a.first + a.examples):
        if time.monotonic() - begin > a.seconds:
            break
        with torch.inference_mode():
            wanted = [q for q in questions(1, drawing) if q.drawing // 100_000 % 100 in numbers]
            take(columns, wanted, processor)
        asked += wanted
        tokens += sum(len(processor.tokenizer.encode_plain(q.reference)) + 1 for q in wanted)
    print(table(columns, asked, tokens))
    drawn = len({q.drawing for q in asked}) // len(numbers)
    print(f"\n{drawn} drawings of a family; {len(asked)} questions; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
