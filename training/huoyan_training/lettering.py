"""Words to read and how they are printed: fonts, boards, where each character stands."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from string import ascii_lowercase

from PIL import Image, ImageDraw, ImageFont

from .example import CLASS_INDEX, COLOUR_INDEX, Mark
from .palette import RGB, darker, ink, lighter
from .scene import Sign
from .splits import word_split

FONT_FILES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10", "cmss10", "cmtt10", "cmb10", "",
)  # fmt: skip
INKS = ("black", "black", "white", "red", "blue", "green", "purple", "orange")

_WORDS = (
    "stop go exit open shut taxi bus car park hotel cafe bar shop sale book bank zoo gym tea milk rice "
    "soup cake pizza bread apple lemon mango grape peach melon cat dog fox cow pig hen bird fish bear "
    "lion tiger horse sheep sun moon star sky sea lake hill road city town home house room door north "
    "south east west left right up down in out on off yes no hello hi ok welcome thanks love hope peace "
    "luck happy new old hot cold big small fast slow red blue green black white pink gold iron menu "
    "food ticket gate train metro ship boat plane rocket radio phone mail post news jazz rock opera "
    "movie game chess poker police fire help danger slow water music school museum garden market bakery "
    "office studio salon motel spa lab art one two three four five six seven eight nine ten king queen "
    "ace jack joker hero wizard robot alien ghost candy sugar spring summer autumn winter monday friday "
    "today june july april march london paris rome tokyo berlin huoyan demo tiny "
)
WORDS = tuple(_WORDS.split())
# Letters whose small form is not a shrunken capital: one of them tells the case of the whole word.
CASE_TELLING = set("abdefghilmnqrtyjkp")


# A word of these alone could as well be a number.
LOOK_ALIKE = set("OIlo")


@lru_cache(maxsize=2048)
def font(index: int, size: int) -> ImageFont.FreeTypeFont:
    """Font `index` of FONT_FILES at `size` pixels; the last is the one inside Pillow."""
    name = FONT_FILES[index]
    if not name:
        return ImageFont.load_default(size)  # type: ignore[return-value]
    return ImageFont.truetype(str(_font_folder() / f"{name}.ttf"), size)


@lru_cache(maxsize=1)
def _font_folder() -> Path:
    """matplotlib's fonts, found without importing it; `$HUOYAN_FONTS` names another folder that has them."""
    named = os.environ.get("HUOYAN_FONTS")
    if named:
        return Path(named)
    found = find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("training draws text with matplotlib's fonts: install the extra `huoyan[train]`")
    return Path(found.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=64)
def _capital_share(index: int) -> float:
    box = font(index, 200).getbbox("H")
    return (box[3] - box[1]) / 200


@lru_cache(maxsize=16384)
def _advance(index: int, size: int, character: str) -> float:
    return font(index, size).getlength(character)


def font_size(index: int, capital_height: float) -> int:
    return max(6, round(capital_height / _capital_share(index)))


def _candidate(dice: Random) -> str:
    kind = dice.random()
    if kind < 0.25:
        n = dice.choice((1, 2, 2, 3, 3, 4, 5, 6))
        return "".join(dice.choice("0123456789") for _ in range(n))
    if kind < 0.55:
        word = dice.choice(WORDS)
        if len(word) > 6:
            word = word[:6] if dice.random() < 0.3 else "stop"
    else:
        n = dice.choice((1, 2, 3, 3, 4, 4, 5, 5, 6))
        if dice.random() < 0.5:
            word = "".join(dice.choice(ascii_lowercase) for _ in range(n))
        else:
            vowels = dice.randrange(2)
            word = "".join(
                dice.choice("aeiou" if (k + vowels) % 2 else "bcdfghjklmnprstvwxyz") for k in range(n)
            )
    case = dice.random()
    if case < 0.62 or len(word) < 2:
        return word.upper()
    if case < 0.82:
        return word if CASE_TELLING & set(word) else word.upper()
    capitalised = word.capitalize()
    return capitalised if CASE_TELLING & set(word[1:]) and "l" not in word else word.upper()


def choose_word(dice: Random, split: str, most: int = 6) -> str:
    """1 to `most` characters: digits, capitals, small letters or a capitalised word; no look-alikes alone."""
    while True:
        word = _candidate(dice)
        if len(word) <= most and not (set(word) <= LOOK_ALIKE) and word_split(word) == split:
            return word


_NARROW = set("IJijlrtf1")


def hard_word(dice: Random) -> str:
    """Of the training's words one that is read wrongly more often than others: longer, with narrow characters."""
    words = [choose_word(dice, "train") for _ in range(3)]
    return max(
        words,
        key=lambda word: len(word) + 1.5 * sum(c in _NARROW for c in word) - 3 * (word.lower() in WORDS),
    )


def measure(sign: Sign) -> float:
    """Width of the printed text in pixels."""
    size = font_size(sign.font, sign.height)
    return sum(_advance(sign.font, size, c) for c in sign.text) + sign.height * 0.08 * (len(sign.text) - 1)


def board_box(sign: Sign) -> tuple[float, float, float, float]:
    half_w, half_h = sign.width / 2 + sign.height * 0.5, sign.height * 1.05
    return sign.x - half_w, sign.y - half_h, sign.x + half_w, sign.y + half_h


def board_colours(sign: Sign, dice: Random) -> tuple[RGB, RGB]:
    """(board, letters): a light board for dark letters and the other way round."""
    letters = ink(sign.ink, dice)
    if sign.ink in ("white", "orange"):
        choices: list[RGB] = [(200, 30, 35), (25, 75, 180), (20, 110, 60), (40, 40, 46), (90, 45, 130)]
        if sign.ink == "orange":
            choices = [(30, 30, 36), (20, 35, 80)]
    else:
        choices = [(252, 252, 250), (246, 240, 214), (250, 220, 70), (222, 232, 242)]
        if sign.ink != "black":
            choices = [(252, 252, 250), (246, 243, 228)]
    return dice.choice(choices), letters


def paint_sign(canvas: Image.Image, sign: Sign, scale: int) -> list[Mark]:
    """Prints the sign on a canvas `scale` times the picture's size and returns the characters' marks."""
    dice = Random(sign.seed)
    size = font_size(sign.font, sign.height * scale)
    face = font(sign.font, size)
    letters = ink(sign.ink, dice)
    draw = ImageDraw.Draw(canvas)
    if sign.board:
        board, letters = board_colours(sign, dice)
        x0, y0, x1, y1 = (v * scale for v in board_box(sign))
        h = sign.height * scale
        edge = darker(board, 0.45) if dice.random() < 0.6 else lighter(letters, 0.1)
        radius = h * dice.choice((0, 0.25, 0.5))
        if dice.random() < 0.5:
            post = h * 0.16
            draw.rectangle(
                ((x0 + x1) / 2 - post, y1, (x0 + x1) / 2 + post, y1 + 2.2 * h), fill=(120, 112, 104)
            )
        draw.rounded_rectangle(
            (x0, y0, x1, y1), radius=radius, fill=board, outline=edge, width=max(1, round(h * 0.09))
        )
    gap = sign.height * scale * 0.08
    x = sign.x * scale - sign.width * scale / 2
    baseline = (sign.y + sign.height / 2) * scale
    mask = Image.new("L", canvas.size, 0) if sign.angle else None
    target = ImageDraw.Draw(mask) if mask is not None else draw
    fill: int | RGB = 255 if mask is not None else letters
    marks: list[Mark] = []
    for c in sign.text:
        target.text((x, baseline), c, font=face, fill=fill, anchor="ls")
        left, top, right, bottom = face.getbbox(c, anchor="ls")
        box = (x + left, baseline + top, x + right, baseline + bottom)
        marks.append(Mark(CLASS_INDEX[c], COLOUR_INDEX[sign.ink], _turned(box, sign, scale)))
        x += _advance(sign.font, size, c) + gap
    if mask is not None:
        centre = (sign.x * scale, sign.y * scale)
        turned = mask.rotate(sign.angle, Image.Resampling.BILINEAR, center=centre)
        canvas.paste(letters, (0, 0), turned)
    return marks


def _turned(box: tuple[float, float, float, float], sign: Sign, scale: int) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (v / scale for v in box)
    if sign.angle:
        a = math.radians(sign.angle)
        cx, cy = (x0 + x1) / 2 - sign.x, (y0 + y1) / 2 - sign.y
        nx, ny = sign.x + cx * math.cos(a) + cy * math.sin(a), sign.y - cx * math.sin(a) + cy * math.cos(a)
        w, h = x1 - x0, y1 - y0
        x0, y0, x1, y1 = nx - w / 2, ny - h / 2, nx + w / 2, ny + h / 2
    return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
