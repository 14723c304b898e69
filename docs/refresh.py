"""Run the examples of both READMEs with the embedded model, write their present outputs into the pages, and draw
docs/images/ask.png from a real answer.

    python docs/refresh.py [--font FILE [--index N]]      (a font with Chinese characters)

Run it after the embedded model or what the commands print has changed; tests/docs holds the pages to it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.docs.blocks import read_blocks  # noqa: E402
from tests.docs.running import prepare, run_bash, run_python  # noqa: E402

PAGES = (REPOSITORY / "README.md", REPOSITORY / "README.zh-CN.md")
PICTURE = REPOSITORY / "src" / "huoyan" / "tiny" / "media" / "airplane.jpg"
QUESTIONS = ("请描述这张图片", "Describe this picture.", "飞机是什么颜色的？")


def outputs() -> list[str | None]:
    """What each block of the English page prints; None for those that are not run."""
    blocks = read_blocks(PAGES[0])
    found: dict[int, str] = {}
    session = [block for block in blocks if block.kind == "python" and block.runs]
    with tempfile.TemporaryDirectory() as folder:
        printed = run_python(session, prepare(Path(folder)))
    for block, text in zip(session, printed, strict=True):
        found[block.start] = text
    for block in blocks:
        if block.kind == "bash" and block.runs:
            with tempfile.TemporaryDirectory() as folder:
                found[block.start] = run_bash(block, prepare(Path(folder)))
    return [found.get(block.start) for block in blocks]


def write(page: Path, texts: list[str | None]) -> None:
    """Put the outputs into their places in one page."""
    text = page.read_text(encoding="utf-8")
    for block, printed in reversed(list(zip(read_blocks(page), texts, strict=True))):
        if printed is not None and block.shown_at is not None:
            text = text[: block.shown_at[0]] + printed + text[block.shown_at[1] :]
    page.write_text(text, encoding="utf-8")


def ask(question: str) -> str:
    command = [sys.executable, "-m", "huoyan", "ask", "--model", "tiny", str(PICTURE), question]
    settings = {"PYTHONPATH": str(REPOSITORY / "src"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout.strip()


def draw(out: Path, font: str, index: int) -> None:
    """A terminal with the questions and their answers, and the picture they are about beside it."""
    from PIL import Image, ImageDraw, ImageFont

    size, margin, bar, leading = 27, 44, 58, 46
    letters = ImageFont.truetype(font, size, index)
    lines: list[list[tuple[str, str]]] = [[("$ ", "#7f8c98"), ("export HUOYAN_MODEL=tiny", "#e6edf3")], []]
    for question in QUESTIONS:
        lines.append(
            [("$ ", "#7f8c98"), ("huoyan ask ", "#e6edf3"), (f'airplane.jpg "{question}"', "#9ecbff")]
        )
        lines += [[(ask(question), "#f2cc60")], []]
    lines.pop()
    with Image.open(PICTURE) as opened:
        picture = opened.convert("RGB")
    height = bar + 2 * margin + leading * len(lines)
    inner = height - bar - 2 * margin
    picture = picture.resize((round(picture.width * inner / picture.height), inner), Image.Resampling.LANCZOS)
    widest = max(sum(letters.getlength(text) for text, _ in line) for line in lines)
    left = margin + round(widest) + margin
    width = left + picture.width + margin
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((0, 0, width - 1, height - 1), 20, fill="#0d1117")
    pen.rounded_rectangle((0, 0, width - 1, bar), 20, fill="#21262d", corners=(True, True, False, False))
    for number, colour in enumerate(("#ff5f57", "#febc2e", "#28c840")):
        x = margin + 34 * number
        pen.ellipse((x - 9, bar // 2 - 9, x + 9, bar // 2 + 9), fill=colour)
    name = "tiny, the embedded demonstration model"
    pen.text(
        (width / 2, bar / 2), name, fill="#7f8c98", font=ImageFont.truetype(font, 21, index), anchor="mm"
    )
    y = bar + margin
    for line in lines:
        x = float(margin)
        for text, colour in line:
            pen.text((x, y + leading / 2), text, fill=colour, font=letters, anchor="lm")
            x += letters.getlength(text)
        y += leading
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, picture.width - 1, picture.height - 1), 12, fill=255)
    image.paste(picture, (left, bar + margin), mask)
    out.parent.mkdir(exist_ok=True)
    image.save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Refresh the READMEs' outputs and the picture.")
    parser.add_argument("--font", help="draw docs/images/ask.png with this font")
    parser.add_argument("--index", type=int, default=0, help="which font of a collection (.ttc)")
    options = parser.parse_args()
    texts = outputs()
    for page in PAGES:
        write(page, texts)
    if options.font:
        draw(REPOSITORY / "docs" / "images" / "ask.png", options.font, options.index)


if __name__ == "__main__":
    main()
