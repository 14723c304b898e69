"""Words for things, colours, numbers and places in Chinese and English, and the noun phrases made of them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

LANGUAGES = ("zh", "en")


@dataclass(frozen=True, slots=True)
class Noun:
    one: str
    many: str
    zh: str
    measure: str


NOUNS = {
    "airplane": Noun("airplane", "airplanes", "飞机", "架"),
    "car": Noun("car", "cars", "汽车", "辆"),
    "bus": Noun("bus", "buses", "公交车", "辆"),
    "boat": Noun("boat", "boats", "船", "艘"),
    "bird": Noun("bird", "birds", "鸟", "只"),
    "fish": Noun("fish", "fish", "鱼", "条"),
    "cat": Noun("cat", "cats", "猫", "只"),
    "person": Noun("person", "people", "人", "个"),
    "house": Noun("house", "houses", "房子", "座"),
    "tree": Noun("tree", "trees", "树", "棵"),
    "flower": Noun("flower", "flowers", "花", "朵"),
    "sun": Noun("sun", "suns", "太阳", "个"),
    "moon": Noun("moon", "moons", "月亮", "个"),
    "star": Noun("star", "stars", "星星", "颗"),
    "heart": Noun("heart", "hearts", "爱心", "颗"),
    "circle": Noun("circle", "circles", "圆形", "个"),
    "square": Noun("square", "squares", "正方形", "个"),
    "triangle": Noun("triangle", "triangles", "三角形", "个"),
}
THING = Noun("thing", "things", "东西", "个")

COLOUR_ZH = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色", "black": "黑色", "white": "白色", "gray": "灰色",
}  # fmt: skip

PLACES = {
    "top left": ("in the top left corner", "左上角"),
    "top": ("at the top", "上方"),
    "top right": ("in the top right corner", "右上角"),
    "left": ("on the left", "左边"),
    "middle": ("in the middle", "中间"),
    "right": ("on the right", "右边"),
    "bottom left": ("in the bottom left corner", "左下角"),
    "bottom": ("at the bottom", "下方"),
    "bottom right": ("in the bottom right corner", "右下角"),
}
PLACE_ORDER = {name: index for index, name in enumerate(PLACES)}

RELATIONS = {
    "left": ("to the left of", "左边"),
    "right": ("to the right of", "右边"),
    "above": ("above", "上面"),
    "below": ("below", "下面"),
}

# Backdrops: English noun phrase, with preposition, Chinese noun, Chinese place.
BACKDROPS = {
    "sky": ("the clear blue sky", "in the clear blue sky", "晴朗的蓝天", "晴朗的蓝天上"),
    "cloudy": ("a cloudy sky", "in the cloudy sky", "多云的天空", "多云的天空中"),
    "night": ("the night sky", "in the night sky", "夜空", "夜空中"),
    "grass": ("grass", "on the grass", "草地", "草地上"),
    "sea": ("the sea", "on the sea", "大海", "大海上"),
    "street": ("a street", "on the street", "马路", "马路上"),
    "beach": ("a beach", "on the beach", "沙滩", "沙滩上"),
    "snow": ("snow", "in the snow", "雪地", "雪地上"),
    "mountain": ("the mountains", "in front of the mountains", "大山", "大山前"),
    "white": ("white", "on a white background", "白色", "白色背景上"),
    "black": ("black", "on a black background", "黑色", "黑色背景上"),
    "gray": ("gray", "on a gray background", "灰色", "灰色背景上"),
    "yellow": ("yellow", "on a yellow background", "黄色", "黄色背景上"),
    "pink": ("pink", "on a pink background", "粉色", "粉色背景上"),
}
PLAIN = ("white", "black", "gray", "yellow", "pink")

NUMBERS_EN = ("no", "one", "two", "three", "four", "five")
NUMBERS_ZH = ("零", "一", "两", "三", "四", "五")
ORDINALS = (("first", "第一"), ("second", "第二"), ("third", "第三"))

DIRECTIONS = {
    "left": ("to the left", "向左"),
    "right": ("to the right", "向右"),
    "up": ("up", "向上"),
    "down": ("down", "向下"),
}

# What a thing does where it belongs: (English participle, Chinese verb).
DOINGS = {
    **{("airplane", b): ("flying", "飞行") for b in ("sky", "cloudy", "night", "mountain")},
    **{("bird", b): ("flying", "飞翔") for b in ("sky", "cloudy", "night", "mountain")},
    ("boat", "sea"): ("sailing", "航行"),
    ("fish", "sea"): ("swimming", "游动"),
    ("car", "street"): ("driving", "行驶"),
    ("bus", "street"): ("driving", "行驶"),
    ("sun", "sky"): ("shining", "照耀"),
    ("moon", "night"): ("shining", "照耀"),
    ("star", "night"): ("shining", "闪烁"),
}


def noun(kind: str) -> Noun:
    return THING if kind == "thing" else NOUNS[kind]


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def kinds_of(kind: str, colour: str | None, lang: str, many: bool = True) -> str:
    """ "red cars" / "红色的汽车": a kind, with its colour if given, without a number."""
    n = noun(kind)
    if lang == "zh":
        if not colour:
            return n.zh
        return f"穿{COLOUR_ZH[colour]}衣服的人" if kind == "person" else f"{COLOUR_ZH[colour]}的{n.zh}"
    word = n.many if many else n.one
    if not colour:
        return word
    return f"{word} in {colour}" if kind == "person" else f"{colour} {word}"


def some(kind: str, colour: str | None, count: int, lang: str, number: bool = False) -> str:
    """ "a red car", "two red cars" / "一辆红色的汽车"; with `number` one is "one"."""
    phrase = kinds_of(kind, colour, lang, count != 1)
    if lang == "zh":
        return f"{NUMBERS_ZH[count]}{noun(kind).measure}{phrase}"
    if count == 1 and not number:
        return f"{article(phrase)} {phrase}"
    return f"{NUMBERS_EN[count]} {phrase}"


def the(kind: str, colour: str | None, count: int, lang: str) -> str:
    """ "the red cars" / "红色的汽车"."""
    phrase = kinds_of(kind, colour, lang, count != 1)
    return phrase if lang == "zh" else f"the {phrase}"


def be(count: int) -> str:
    return "is" if count == 1 else "are"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def place(name: str, lang: str) -> str:
    return PLACES[name][lang == "zh"]


def listed(parts: list[str], lang: str) -> str:
    if lang == "zh":
        return "，".join(parts)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def vary(question: str, lang: str, dice: Random) -> str:
    """The same question as people type it: a polite start, another end mark or none."""
    r = dice.random()
    if lang == "zh":
        asks = question.endswith("？")
        if r < 0.12 and not question.startswith("请"):
            question = ("请问" if asks else "请") + question
        elif 0.12 <= r < 0.2:
            return question.rstrip("？。")
        elif 0.2 <= r < 0.27:
            return question.rstrip("？。") + ("?" if asks else "。")
        return question
    if r < 0.06:
        return question.rstrip("?.")
    if r < 0.12:
        return question[0].lower() + question[1:]
    if r < 0.17:
        return question[0].lower() + question[1:].rstrip("?.")
    return question


def on_backdrop(name: str, lang: str) -> str:
    """ "in the clear blue sky" / "晴朗的蓝天上"."""
    return BACKDROPS[name][3 if lang == "zh" else 1]


def backdrop_noun(name: str, lang: str) -> str:
    """ "the clear blue sky" / "晴朗的蓝天"."""
    return BACKDROPS[name][2 if lang == "zh" else 0]
