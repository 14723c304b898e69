"""What `make demo` runs: the embedded model looks at a few drawings and a short clip, and is timed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import huoyan

MEDIA = Path(huoyan.__file__).parent / "tiny" / "media"


def main() -> None:
    print("huoyan", huoyan.__version__, "- loading tiny, a demonstration model trained on drawings only")
    start = time.perf_counter()
    llm = huoyan.LLM("tiny")
    print(f"ready after {time.perf_counter() - start:.1f} s\n")
    questions = [
        ("airplane.jpg", "请描述这张图片"),
        ("street.jpg", "What color is the house?"),
        ("sign.jpg", "What does the sign say?"),
        (["stars.jpg", "stars_later.jpg"], "What changed between the two pictures?"),
        ("car.mp4", "What moves, and where to?"),
    ]
    for files, question in questions:
        names = [files] if isinstance(files, str) else files
        shown = [huoyan.Video.open(MEDIA / n) if n.endswith("mp4") else MEDIA / n for n in names]
        begun = time.perf_counter()
        answer = llm.ask(shown, question)
        seconds = time.perf_counter() - begun
        print(f"[{', '.join(names)}]\n  Q: {question}\n  A: {answer}\n  ({seconds:.2f} s)\n")
    print("It is small and sometimes wrong; its scores are in src/huoyan/tiny/checkpoint/README.md.")
    print("your own: huoyan ask --model tiny PICTURE 'question'   (pictures are in", f"{MEDIA})")


if __name__ == "__main__":
    sys.exit(main())
