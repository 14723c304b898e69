"""The calibration set that needs no files: drawn pictures of many kinds, with questions in two languages.

Nothing in it is a test of the model; it only has to make the decoder's activations look as they do in use:
pictures of several sizes, print, charts, textures, long and short answers, Chinese and English.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from huoyan.media.picture import Picture
from huoyan.quantize.calibration import CalibrationItem

MAX_SLICES = 4
"""Enough to see slices; a model of small slices would otherwise cut these pictures into many more."""
Draw = Callable[[np.random.Generator], Image.Image]


def _landscape(rng: np.random.Generator) -> Image.Image:
    width, height = int(rng.integers(240, 720)), int(rng.integers(200, 480))
    rows = np.linspace(0, 1, height)[:, None, None]
    sky, far = rng.integers(90, 255, 3), rng.integers(120, 255, 3)
    image = Image.fromarray(
        np.broadcast_to(sky * (1 - rows) + far * rows, (height, width, 3)).astype(np.uint8)
    )
    draw = ImageDraw.Draw(image)
    for depth in range(3):
        base = height * (0.5 + 0.15 * depth)
        xs = np.arange(0, width + 8, 8)
        phase, waves = rng.random() * 6, rng.random() * 0.02 + 0.005
        ys = base + height * 0.08 * np.sin(xs * waves + phase)
        points = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
        colour = tuple(int(c) for c in rng.integers(20, 150, 3))
        draw.polygon([*points, (width, height), (0, height)], fill=colour)
    x, y, r = rng.random() * width, height * 0.2, height * 0.08
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(250, 220, 90))
    return image


def _page(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (int(rng.integers(360, 900)), int(rng.integers(300, 900))), "white")
    draw = ImageDraw.Draw(image)
    words = "invoice total price date item number amount page chapter the of and to in is".split()
    y = 20
    while y < image.height - 30:
        size = int(rng.choice([14, 16, 18, 26]))
        line = " ".join(
            rng.choice(words) + str(rng.integers(0, 999)) * (rng.random() < 0.3) for _ in range(9)
        )
        draw.text((20, y), line, fill=(20, 20, 30), font=ImageFont.load_default(size))
        y += int(size * 1.5)
    return image


def _chart(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (480, 320), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for i, value in enumerate(rng.integers(20, 240, 7)):
        colour = tuple(int(c) for c in rng.integers(40, 220, 3))
        draw.rectangle((40 + 60 * i, 280 - int(value), 80 + 60 * i, 280), fill=colour)
        draw.text((45 + 60 * i, 285), str(int(value)), fill=(0, 0, 0), font=ImageFont.load_default(14))
    draw.line((30, 20, 30, 280, 470, 280), fill=(0, 0, 0), width=2)
    return image


def _texture(rng: np.random.Generator) -> Image.Image:
    side = int(rng.integers(150, 520))
    noise = rng.normal(0, 1, (side, side, 3))
    spectrum = np.fft.fft2(noise, axes=(0, 1))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))[..., None] + 1 / side
    smooth = np.real(np.fft.ifft2(spectrum / frequency ** rng.uniform(0.6, 1.6), axes=(0, 1)))
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return Image.fromarray((smooth * 255).astype(np.uint8))


def _objects(rng: np.random.Generator) -> Image.Image:
    width, height = int(rng.integers(160, 480)), int(rng.integers(160, 480))
    image = Image.new("RGB", (width, height), tuple(int(c) for c in rng.integers(120, 255, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 9))):
        x, y, r = rng.random() * width, rng.random() * height, rng.uniform(12, 70)
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        sides = int(rng.integers(0, 7))
        if sides < 3:
            draw.ellipse((x - r, y - r * 0.7, x + r, y + r * 0.7), fill=colour)
        else:
            turn = rng.random() * 6
            corners = [
                (
                    x + r * math.cos(turn + 2 * math.pi * i / sides),
                    y + r * math.sin(turn + 2 * math.pi * i / sides),
                )
                for i in range(sides)
            ]
            draw.polygon(corners, fill=colour, outline=(0, 0, 0))
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2))))


_PICTURES: tuple[Draw, ...] = (_landscape, _page, _chart, _texture, _objects)

_ABOUT_PICTURES: tuple[tuple[str, str], ...] = (
    ("请描述这张图片", "这张图片里有几种颜色和形状。画面的下方颜色较深,上方较亮,整体看起来很安静。"),
    (
        "Describe this picture in detail.",
        "The picture shows several coloured shapes. The lower part is darker than the "
        "upper part, and the edges between the areas are easy to see.",
    ),
    ("图中有什么文字?", "图中的文字大多是单词和数字,从上到下排成几行。"),
    ("What text can you read?", "There are several short words and numbers, set in rows from top to bottom."),
    ("图里一共有几个物体?", "大约有五个。"),
    ("Which colour is the largest area?", "A light blue, in the upper half."),
    ("这张图适合用在什么地方?请说明理由。", "它可以用在报告里,因为画面清楚,重点也容易找到。"),
    (
        "Summarise the chart in two sentences.",
        "The bars rise and fall without a clear trend. The highest is more than twice the lowest.",
    ),
)

_TEXT_ONLY: tuple[tuple[str, str], ...] = (
    (
        "用三句话介绍一下量化。",
        "量化是用较少的位数表示模型的权重。它能减少显存,也能加快生成速度。代价是数值会有一点误差。",
    ),
    (
        "Explain what a cache is to a child.",
        "A cache is like keeping your favourite toys on the table instead of in the cupboard: "
        "you get to them faster, but the table is small.",
    ),
    ("写一个计算平均数的 Python 函数。", "def mean(values):\n    return sum(values) / len(values)"),
    ("Translate into Chinese: the weather is fine today.", "今天天气很好。"),
)


def builtin_items(count: int = 48, seed: int = 2024) -> list[CalibrationItem]:
    """The set, the same every time: about a tenth text only, a few with two pictures."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(count):
        if i % 10 == 9:
            question, answer = _TEXT_ONLY[i // 10 % len(_TEXT_ONLY)]
            items.append(CalibrationItem(question, (), answer))
            continue
        question, answer = _ABOUT_PICTURES[i % len(_ABOUT_PICTURES)]
        drawn = [_PICTURES[(i + k) % len(_PICTURES)](rng) for k in range(2 if i % 12 == 5 else 1)]
        pictures = tuple(Picture(np.asarray(image.convert("RGB"))) for image in drawn)
        items.append(CalibrationItem(question, pictures, answer, MAX_SLICES))
    return items
