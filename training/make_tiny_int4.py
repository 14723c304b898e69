"""Make `tiny-int4` of `tiny`: python training/make_tiny_int4.py [--out FOLDER] [--model FOLDER_OR_NAME]

Draws the calibration pictures, quantizes, and puts the result where `--model tiny-int4` finds it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(_ROOT), str(_ROOT.parent / "src")]

OUT = _ROOT.parent / "src" / "huoyan" / "tiny" / "checkpoint-int4"
ITEMS = 128
GROUP_SIZE = 64
"""tiny's matrices have 256 and 768 inputs: groups of 128 would be as coarse for them as 2048 for the model."""
_HEADER = """---
license: apache-2.0
language: [zh, en]
pipeline_tag: image-text-to-text
library_name: huoyan
---

# tiny-int4: the demonstration model in int4

`tiny` with the matrices of its decoder in four bits (compensated rounding, AWQ scales where they help it, groups of
{group_size}), made by `python training/make_tiny_int4.py`. It is a demonstration model: see the card of `tiny` for
what it knows and `docs/quantization.md` for what four bits cost it.

Held-out answers of the calibration set: perplexity {before:.4f} in 16 bits, {after:.4f} in int4;
{agreement:.1f} % of the likeliest tokens agree.
"""


def make(model: str, out: Path) -> None:
    """Quantize into a folder beside `out`, then replace `out`."""
    from huoyan.cli.quantize import summary
    from huoyan.quantize.run import quantize
    from make_calibration import write

    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / "model"
        lines = write(Path(scratch) / "calibration", ITEMS)
        report = quantize(
            model, made, calibration=lines, group_size=GROUP_SIZE, compensate=True, device="cpu"
        )
        assert report.perplexity_before is not None
        assert report.perplexity_after is not None
        assert report.agreement is not None
        card = _HEADER.format(
            group_size=GROUP_SIZE,
            before=report.perplexity_before,
            after=report.perplexity_after,
            agreement=100 * report.agreement,
        )
        (made / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    print(summary(report).replace(str(made), "tiny-int4"))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="tiny")
    p.add_argument("--out", type=Path, default=OUT)
    a = p.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    make(a.model, a.out)


if __name__ == "__main__":
    main()
