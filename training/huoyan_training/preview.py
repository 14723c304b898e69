"""Contact sheets to look at: `python -m huoyan_training.preview OUT_FOLDER [FAMILY…] [--split S] [--seed N]`.

Pictures appear as the model gets them in its overview (224 x 224 pixels of area),
with questions and answers below.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .example import Example
from .families import FAMILIES, sample
from .splits import SPLITS

CELL, LINE = 300, 13
CJK_FONTS = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/System/Library/Fonts/PingFang.ttc",
)  # fmt: skip


def caption_font(path: str | None) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with Chinese if one is found, else Pillow's own (which shows Chinese as boxes)."""
    for candidate in (path, *CJK_FONTS):
        if candidate and Path(candidate).exists():
            return ImageFont.truetype(candidate, 11)
    return ImageFont.load_default(11)


def as_seen(pixels: np.ndarray) -> Image.Image:
    """The overview that the preprocessor makes: 224 x 224 pixels of area, sides divisible by 14."""
    image = Image.fromarray(pixels)
    ratio = image.width / image.height
    height = int(224 / ratio**0.5)
    width = int(height * ratio)
    size = max(round(width / 14) * 14, 14), max(round(height / 14) * 14, 14)
    return image.resize(size, Image.Resampling.BICUBIC)


def sheet(
    examples: list[Example], columns: int = 4, font: str | None = None, english_only: bool = False
) -> Image.Image:
    """A page of the examples in rows; further pictures of one example stand beside the first, smaller."""
    face = caption_font(font)
    lines = 2 * max(len(e.turns) for e in examples)
    height = CELL - 70 + lines * LINE
    page = Image.new("RGB", (columns * CELL, -(-len(examples) // columns) * height), (225, 225, 230))
    draw = ImageDraw.Draw(page)
    for k, example in enumerate(examples):
        x, y = (k % columns) * CELL, (k // columns) * height
        n = len(example.pictures)
        across = 1 if n <= 1 else 2 if n <= 4 else 3
        for i, pixels in enumerate(example.pictures):
            seen = as_seen(pixels)
            seen.thumbnail(((CELL - 8) // across, 224 // across))
            page.paste(
                seen, (x + 4 + (i % across) * (CELL // across), y + 2 + (i // across) * (224 // across))
            )
        at = y + 228
        for (question, answer), language in zip(example.turns, example.languages, strict=True):
            if english_only and language == "zh":
                continue
            draw.text((x + 4, at), question[:60], font=face, fill=(60, 60, 60))
            draw.text((x + 12, at + LINE), answer[:60], font=face, fill=(150, 0, 0))
            at += 2 * LINE
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--font", help="a font file with Chinese")
    parser.add_argument("--english", action="store_true", help="show the English turns only")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for family in options.families or FAMILIES:
        rng = np.random.default_rng(options.seed)
        examples = [sample(rng, family, options.split) for _ in range(options.count)]
        path = options.folder / f"{family}.png"
        sheet(examples, font=options.font, english_only=options.english).save(path)
        print(path)


if __name__ == "__main__":
    main()
