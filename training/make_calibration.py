"""Draw what `tiny` is quantized with: python training/make_calibration.py FOLDER [--items 64] [--first-seed N]

FOLDER gets pictures and `calibration.jsonl` (`--calibration FOLDER/calibration.jsonl` of `huoyan quantize`): all
families of the training mixture in turn, of the training split, from seeds that neither training nor
evaluation uses. Videos are left out: a line of a calibration file has pictures only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

FIRST_SEED = 900_000_000
"""Evaluation counts from 10 and 20 millions, training draws numbers of 63 bits."""
FAMILIES = ("describe", "what", "colour", "count", "where", "exists", "word", "two", "slice", "chat")


def examples(number: int, first_seed: int) -> Iterator[tuple[list[object], str, str]]:
    """(pictures, question, answer), one turn of each example."""
    import numpy as np

    from huoyan_training.families import sample

    made = 0
    for seed in count(first_seed):
        example = sample(np.random.default_rng(seed), FAMILIES[seed % len(FAMILIES)], "train")
        if example.kind != "image":
            continue
        question, answer = example.turns[seed // len(FAMILIES) % len(example.turns)]
        yield list(example.pictures), question, answer
        made += 1
        if made == number:
            return


def write(folder: Path, number: int, first_seed: int = FIRST_SEED) -> Path:
    """Write the set and return the path of its JSONL file."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "calibration.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i, (pictures, question, answer) in enumerate(examples(number, first_seed)):
            names = [f"{i:03d}-{k}.png" for k in range(len(pictures))]
            for name, picture in zip(names, pictures, strict=True):
                Image.fromarray(picture).save(folder / name)  # type: ignore[arg-type]
            row = {"question": question, "images": names, "answer": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--items", type=int, default=64)
    p.add_argument("--first-seed", type=int, default=FIRST_SEED)
    a = p.parse_args()
    print(write(a.folder, a.items, a.first_seed))


if __name__ == "__main__":
    main()
