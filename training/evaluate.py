"""How well a checkpoint answers about drawings it has never seen: accuracies, confusion tables, a model card.

    python training/evaluate.py CHECKPOINT [--out eval.json] [--card README.md] [--examples 100] [--device cuda|cpu]

The answers come from the plain PyTorch model of `huoyan.models`, greedily, many at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(_ROOT), str(_ROOT.parent / "src")]

SPLITS = ("heldout", "unseen")


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--out", type=Path, help="write the whole report here")
    p.add_argument("--card", type=Path, help="write a model card here")
    p.add_argument("--examples", type=int, default=100, help="examples of each family and split")
    p.add_argument("--families", help="only these, separated by commas")
    p.add_argument(
        "--first", type=int, default=0, help="number of the first example (others are other drawings)"
    )
    p.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    p.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    p.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 1, 1))
    return p.parse_args()


def jobs(families: Sequence[str], examples: int, first: int = 0) -> list[tuple[int, str, str]]:
    """(seed, family, split) of held-out examples; any beginning of the list has all families and splits alike."""
    return [
        (10_000_000 * (s + 1) + 100_000 * f + i, family, split)
        for i in range(first, first + examples)
        for s, split in enumerate(SPLITS)
        for f, family in enumerate(families)
    ]


def main() -> None:
    a = parse_arguments()
    import torch

    from huoyan.media.slicing import read_slice_rules
    from huoyan.models.checkpoint import open_checkpoint
    from huoyan.models.weights import load_model
    from huoyan_training.families import FAMILIES
    from tiny_trainer.card import model_card
    from tiny_trainer.drawing import HeldOutJob, Recorder
    from tiny_trainer.evaluation import evaluate, summary
    from tiny_trainer.generate import Prompted, greedy_answers
    from tiny_trainer.plain import use_plain_operators
    from tiny_trainer.sequences import SequenceBuilder
    from tiny_trainer.workers import parallel_map

    begin = time.monotonic()
    builder = SequenceBuilder(a.checkpoint, read_slice_rules(a.checkpoint))
    families = a.families.split(",") if a.families else list(FAMILIES)
    held = parallel_map(HeldOutJob(Recorder(builder)), jobs(families, a.examples, a.first), a.workers)
    device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(open_checkpoint(a.checkpoint), device=device, dtype=a.dtype)
    print(
        f"{len(held)} examples drawn, {sum(len(h.turns) for h in held)} questions; {time.monotonic() - begin:.0f} s"
    )

    def predict(prompted: Sequence[Prompted]) -> list[list[str]]:
        rows = 512 if device != "cpu" else 48

        def answers() -> list[list[list[int]]]:
            return greedy_answers(model, prompted, builder.slot_id, builder.stop_id, rows=rows, slices=rows)

        try:
            found = answers()
        except RuntimeError as error:
            print(f"answering with our kernels fails here ({str(error)[:200]!r}): without")
            use_plain_operators()
            found = answers()
        return [[builder.decode(ids) for ids in given] for given in found]

    report = evaluate(held, predict)
    print(f"answered after {time.monotonic() - begin:.0f} s")
    earlier = a.out if a.out and a.out.exists() else None
    if earlier is not None:
        report["training"] = json.loads(earlier.read_text(encoding="utf-8")).get("training", {})
    if a.out:
        a.out.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if a.card:
        a.card.write_text(model_card(report), encoding="utf-8")
    print(summary(report))
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
