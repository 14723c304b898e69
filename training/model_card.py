"""Write the model card of `tiny` from an evaluation: python training/model_card.py EVAL_JSON README_MD"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_trainer.card import model_card


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(model_card(report), encoding="utf-8")


if __name__ == "__main__":
    main()
