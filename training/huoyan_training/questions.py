"""Questions about one picture, each with the one answer that its scene gives."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import numpy as np

from .description import DESCRIBE, description
from .example import KINDS, Mark
from .language import (
    COLOUR_ZH,
    LANGUAGES,
    NOUNS,
    RELATIONS,
    article,
    backdrop_noun,
    be,
    capital,
    kinds_of,
    noun,
    place,
    some,
    the,
    vary,
)
from .scene import OBJECT_COLOURS, Group, Scene, cell_of

Turn = tuple[str, str, str, str]  # task, language, question, answer
Asked = tuple[str, str] | None  # question, answer


class Made(NamedTuple):
    """What a family draws, before it becomes an Example."""

    pictures: list[np.ndarray]
    turns: list[Turn]
    marks: list[list[Mark]]
    kind: str = "image"
    unseen: bool = False


def ask_describe(scene: Scene, lang: str, dice: Random, focus: Group | None) -> Asked:
    return dice.choice(DESCRIBE[lang]), description(scene, lang)


def single_named(scene: Scene) -> list[tuple[Group, str | None]]:
    """Groups that a name points to: by kind where no other group has it, else with the colour."""
    return [(g, None if len(scene.of_kind(g.kind)) == 1 else g.colour) for g in scene.groups]


def pick(scene: Scene, dice: Random, focus: Group | None, which: Callable[[Group], bool]) -> Group | None:
    groups = [g for g in scene.groups if which(g)]
    if focus in groups:
        return focus
    return dice.choice(groups) if groups else None


def ask_what(scene: Scene, lang: str, dice: Random, focus: Group | None) -> Asked:
    questions: tuple[str, ...]
    roll = dice.random()
    g: Group | None
    if roll < 0.2:
        back = backdrop_noun(scene.backdrop, lang)
        if lang == "zh":
            return dice.choice(
                ("背景是什么？", "图片的背景是什么？", "这张图的背景是什么样的？")
            ), f"背景是{back}。"
        questions = (
            "What is the background?",
            "What is in the background?",
            "What does the background look like?",
        )
        return dice.choice(questions), f"The background is {back}."
    if len(scene.groups) == 1 and not scene.signs and roll < 0.75:
        g = scene.groups[0]
        what = some(g.kind, g.colour, g.count, lang)
        if lang == "zh":
            return dice.choice(
                ("这是什么？", "图中是什么？", "画的是什么？", "图里的东西是什么？", "这是什么东西？")
            ), f"这是{what}。"
        start = "It is" if g.count == 1 else "They are"
        questions = (
            "What is this?",
            "What is it?",
            "What is drawn here?",
            "What thing is this?",
            "What object is shown?",
        )
        return dice.choice(questions), f"{start} {what}."
    if roll < 0.5:
        g = pick(scene, dice, focus, lambda g: scene.total(colour=g.colour) == g.count)
        if g is None or scene.signs:
            return None
        if lang == "zh":
            colour = COLOUR_ZH[g.colour]
            q = dice.choice(
                (f"什么东西是{colour}的？", f"{colour}的东西是什么？", f"图中哪个东西是{colour}的？")
            )
            return q, f"{colour}的东西是{some(g.kind, None, g.count, lang)}。"
        q = dice.choice(
            (f"What is {g.colour}?", f"Which thing is {g.colour}?", f"What is the {g.colour} thing?")
        )
        things = "thing is" if g.count == 1 else "things are"
        return (
            q,
            f"The {g.colour} {things} {some(g.kind, None, g.count, lang)}.",
        )
    g = pick(scene, dice, focus, lambda g: g.place is not None)
    # A side names everything on it: ask only where that is one group.
    if g is None or g.place is None or scene.signs or not alone_at(scene, g):
        return None
    where = place(g.place, lang)
    what = some(g.kind, g.colour, g.count, lang)
    if lang == "zh":
        return dice.choice(
            (f"{where}有什么？", f"图片{where}是什么？", f"{where}是什么？", f"图中{where}有什么东西？")
        ), f"{where}有{what}。"
    q = dice.choice(
        (
            f"What is {where}?",
            f"What do you see {where}?",
            f"Which thing is {where}?",
            f"What is there {where}?",
        )
    )
    return q, f"There {be(g.count)} {what} {where}."


def alone_at(scene: Scene, group: Group) -> bool:
    """Whether nobody would also mean another thing by the group's place ("left" also holds the corners)."""
    words = set((group.place or "").split())
    whole = group.place == "middle" or len(words) == 2
    spots = [
        (t.x / scene.width, t.y / scene.height) for g in scene.groups if g is not group for t in g.things
    ]
    for x, y in spots:
        cell = cell_of(x, y, 0.0) or ""
        if cell == group.place or (not whole and words & set(cell.split())):
            return False
    return True


def ask_colour(scene: Scene, lang: str, dice: Random, focus: Group | None) -> Asked:
    questions: tuple[str, ...]
    g = pick(scene, dice, focus, lambda g: len(scene.of_kind(g.kind)) == 1)
    if g is None:
        return None
    if dice.random() < 0.15 and g.place and alone_at(scene, g) and g.kind != "person" and not scene.signs:
        where = place(g.place, lang)
        if lang == "zh":
            q = dice.choice((f"{where}的东西是什么颜色的？", f"{where}的东西是什么颜色？"))
            return q, f"{NOUNS[g.kind].zh}是{COLOUR_ZH[g.colour]}的。"
        things = "thing" if g.count == 1 else "things"
        q = dice.choice(
            (
                f"What colour {be(g.count)} the {things} {where}?",
                f"Which color {be(g.count)} the {things} {where}?",
            )
        )
        return q, f"{capital(the(g.kind, None, g.count, lang))} {be(g.count)} {g.colour}."
    zh, name, is_ = NOUNS[g.kind].zh, the(g.kind, None, g.count, lang), be(g.count)
    if g.kind == "person":
        if lang == "zh":
            q = dice.choice(
                ("人穿的衣服是什么颜色的？", "图中的人穿什么颜色的衣服？", "人穿着什么颜色的衣服？")
            )
            return q, f"人穿着{COLOUR_ZH[g.colour]}的衣服。"
        colour_word = dice.choice(("colour", "color"))
        q = dice.choice(
            (f"What {colour_word} {is_} {name} wearing?", f"Which {colour_word} {is_} {name} wearing?")
        )
        return q, f"{capital(name)} {is_} wearing {g.colour}."
    if lang == "zh":
        questions = (
            f"{zh}是什么颜色的？", f"{zh}是什么颜色？", f"图中的{zh}是什么颜色的？",
            f"这{NOUNS[g.kind].measure}{zh}是什么颜色的？",
            f"{zh}的颜色是什么？", f"{zh}什么颜色？",
        )  # fmt: skip
        return dice.choice(questions), f"{zh}是{COLOUR_ZH[g.colour]}的。"
    c = dice.choice(("colour", "color"))
    questions = (
        f"What {c} {is_} {name}?", f"Which {c} {is_} {name}?", f"What is the {c} of {name}?",
        f"What {c} {be(g.count)} {name} in the picture?", f"Tell me the {c} of {name}.",
    )  # fmt: skip
    return dice.choice(questions), f"{capital(name)} {is_} {g.colour}."


def count_sentence(kind: str, colour: str | None, count: int, lang: str) -> str:
    if lang == "zh":
        if count == 0:
            return f"图中没有{kinds_of(kind, colour, lang)}。"
        return f"图中有{some(kind, colour, count, lang)}。"
    return f"There {be(count)} {some(kind, colour, count, lang, number=True)}."


def ask_count(scene: Scene, lang: str, dice: Random, focus: Group | None) -> Asked:
    questions: tuple[str, ...]
    roll = dice.random()
    colour: str | None = None
    if roll < 0.1:
        kind = dice.choice([k for k in KINDS if not scene.of_kind(k)])
    elif roll < 0.22 and not scene.of_kind("person") and not scene.signs:
        kind, colour = "thing", dice.choice([g.colour for g in scene.groups] * 3 + ["red"])
        if scene.total(colour=colour) > 5:
            return None
    elif roll < 0.3 and not scene.of_kind("person") and not scene.signs and scene.total() <= 5:
        kind = "thing"
    else:
        g = pick(scene, dice, focus, lambda g: True)
        if g is None:
            return None
        kind = g.kind
        if len(scene.of_kind(kind)) > 1 or dice.random() < 0.12:
            colour = g.colour if dice.random() < 0.5 or scene.total(kind) > 5 else None
    count = scene.total(None if kind == "thing" else kind, colour)
    answer = count_sentence(kind, colour, count, lang)
    name = kinds_of(kind, colour, lang)
    if lang == "zh":
        m = noun(kind).measure
        questions = (
            f"图中有几{m}{name}？", f"有几{m}{name}？", f"有多少{m}{name}？", f"图里有多少{m}{name}？",
            f"一共有几{m}{name}？",
            f"数一数有几{m}{name}。",
        )  # fmt: skip
        return dice.choice(questions), answer
    questions = (
        f"How many {name} are there?", f"How many {name} are in the picture?", f"How many {name} do you see?",
        f"How many {name}?", f"Count the {name}.", f"What is the number of {name}?",
    )  # fmt: skip
    return dice.choice(questions), answer


def relation(a: Group, b: Group) -> str | None:
    """Where a stands seen from b, where one direction clearly wins."""
    dx, dy = a.things[0].x - b.things[0].x, a.things[0].y - b.things[0].y
    apart = 0.55 * (a.things[0].size + b.things[0].size)
    if abs(dx) > 1.8 * abs(dy) and abs(dx) > apart:
        return "right" if dx > 0 else "left"
    if abs(dy) > 1.8 * abs(dx) and abs(dy) > apart:
        return "below" if dy > 0 else "above"
    return None


def ask_where(scene: Scene, lang: str, dice: Random, focus: Group | None) -> Asked:
    questions: tuple[str, ...]
    named = {id(g): colour for g, colour in single_named(scene)}
    if dice.random() < 0.4:
        singles = [g for g in scene.groups if g.count == 1]
        if len(singles) >= 2:
            a, b = dice.sample(singles, 2)
            if focus in singles and focus is not b:
                a = focus
            found = relation(a, b)
            if found:
                return _relative(a, named[id(a)], b, named[id(b)], found, lang, dice)
    g = pick(scene, dice, focus, lambda g: g.place is not None)
    if g is None or g.place is None:
        return None
    name, is_ = the(g.kind, named[id(g)], g.count, lang), be(g.count)
    where = place(g.place, lang)
    if lang == "zh":
        questions = (
            f"{name}在哪里？", f"{name}在哪儿？", f"{name}在图片的什么位置？", f"{name}在什么地方？",
            f"图中的{name}在哪里？",
            f"{name}在图中哪个位置？",
        )  # fmt: skip
        return dice.choice(questions), f"{name}在{where}。"
    questions = (
        f"Where {is_} {name}?", f"Where {is_} {name} in the picture?", f"Where in the image {is_} {name}?",
        f"In which part of the picture {is_} {name}?", f"Where do you see {name}?",
    )  # fmt: skip
    return dice.choice(questions), f"{capital(name)} {is_} {where}."


def _relative(
    a: Group, ca: str | None, b: Group, cb: str | None, found: str, lang: str, dice: Random
) -> Asked:
    one, other = the(a.kind, ca, 1, lang), the(b.kind, cb, 1, lang)
    words = RELATIONS[found][lang == "zh"]
    sideways = found in ("left", "right")
    roll = dice.random()
    if lang == "zh":
        either = "左边还是右边" if sideways else "上面还是下面"
        q = (
            f"{one}在{other}的{either}？"
            if roll < 0.5
            else f"{one}在{other}的哪边？"
            if roll < 0.8
            else f"{one}在{other}的什么方向？"
        )
        return q, f"{one}在{other}的{words}。"
    either = "to the left or to the right of" if sideways else "above or below"
    q = (
        f"Is {one} {either} {other}?" if roll < 0.5
        else f"Where is {one} relative to {other}?" if roll < 0.8
        else f"On which side of {other} is {one}?"
    )  # fmt: skip
    return q, f"{capital(one)} is {words} {other}."


def ask_exists(scene: Scene, lang: str, dice: Random, focus: Group | None) -> Asked:
    roll = dice.random()
    g = pick(scene, dice, focus, lambda g: True)
    if g is None:
        return None
    if roll < 0.3:
        return _is_it(scene, g, lang, dice)
    kind = g.kind
    colour: str | None = None
    if roll < 0.65:
        if dice.random() < 0.55:
            kind = dice.choice([k for k in KINDS if not scene.of_kind(k)])
    else:
        colour = g.colour
        if dice.random() < 0.5:
            other = dice.choice(scene.groups)
            if other is not g and dice.random() < 0.5:
                kind = other.kind
            else:
                colour = dice.choice(OBJECT_COLOURS)
    count = scene.total(kind, colour)
    if lang == "zh":
        name = kinds_of(kind, colour, lang)
        q = dice.choice(
            (
                f"图中有{name}吗？",
                f"有没有{name}？",
                f"图里有{name}吗？",
                f"这张图里有没有{name}？",
                f"有{name}吗？",
            )
        )
        return q, f"有，图中有{some(kind, colour, count, lang)}。" if count else f"没有，图中没有{name}。"
    many = dice.random() < 0.35
    name = kinds_of(kind, colour, lang, many)
    start = f"{be(2 if many else 1)} there {'any' if many else article(name)} {name}"
    q = dice.choice(
        (f"{capital(start)}?", f"{capital(start)} in the picture?",
        f"Do you see {'any' if many else article(name)} {name}?",
         f"{capital(start)} in this image?", f"Can you see {'any' if many else article(name)} {name}?")
    )  # fmt: skip
    if count:
        return q, f"Yes, there {be(count)} {some(kind, colour, count, lang, number=True)}."
    return q, f"No, there {'are' if many else 'is'} no {name}."


def _is_it(scene: Scene, g: Group, lang: str, dice: Random) -> Asked:
    """Asks of a group that its kind alone names whether it has a colour."""
    if g.kind == "person" or len(scene.of_kind(g.kind)) > 1:
        return None
    true = dice.random() < 0.5
    colour = g.colour if true else dice.choice([c for c in OBJECT_COLOURS if c != g.colour])
    name, is_ = the(g.kind, None, g.count, lang), be(g.count)
    if lang == "zh":
        q = dice.choice(
            (
                f"{name}是{COLOUR_ZH[colour]}的吗？",
                f"图中的{name}是不是{COLOUR_ZH[colour]}的？",
                f"{name}是不是{COLOUR_ZH[colour]}的？",
            )
        )
        return q, f"{'是的' if true else '不是'}，{name}是{COLOUR_ZH[g.colour]}的。"
    q = dice.choice((f"{capital(is_)} {name} {colour}?", f"{capital(is_)} {name} in the picture {colour}?"))
    return q, f"{'Yes' if true else 'No'}, {name} {is_} {g.colour}."


WORD_ZH = (
    "牌子上写着什么？", "图中写着什么？", "图里的文字是什么？", "请读出图中的文字。", "上面写的是什么字？",
    "图中的单词是什么？",
    "请识别图片中的文字。", "写着什么？", "图上写了什么？",
)  # fmt: skip
WORD_EN = (
    "What does the sign say?", "What is written?", "What word is written here?", "Read the text.",
    "What does it say?",
    "What text is in the image?", "Please read the word in the picture.", "What is printed in the picture?",
    "What is written in the image?",
)  # fmt: skip
NUMBER_ZH = ("图中的数字是多少？", "写着什么数字？", "图上的数字是什么？", "请读出图中的数字。")
NUMBER_EN = (
    "What number is written?",
    "What number is this?",
    "Read the number.",
    "Which number do you see?",
)


def quoted(text: str, lang: str) -> str:
    return f"上面写着“{text}”。" if lang == "zh" else f'It says "{text}".'


def ask_word(scene: Scene, lang: str, dice: Random, focus: Group | None) -> Asked:
    if not scene.signs:
        return None
    text = scene.signs[0].text
    questions: tuple[str, ...] = WORD_ZH if lang == "zh" else WORD_EN
    if text.isdigit() and dice.random() < 0.5:
        questions = NUMBER_ZH if lang == "zh" else NUMBER_EN
    q = dice.choice(questions)
    if not scene.signs[0].board and ("牌子" in q or "sign" in q):
        q = questions[1]
    return q, quoted(text, lang)


ASKERS: dict[str, Callable[[Scene, str, Random, Group | None], Asked]] = {
    "describe": ask_describe,
    "what": ask_what,
    "colour": ask_colour,
    "count": ask_count,
    "where": ask_where,
    "exists": ask_exists,
    "word": ask_word,
}


def ask(task: str, scene: Scene, dice: Random, focus: Group | None = None) -> Turn | None:
    """A turn of the task in a random language; None where the scene has nothing to ask about."""
    lang = dice.choice(LANGUAGES)
    asked = ASKERS[task](scene, lang, dice, focus)
    return None if asked is None else (task, lang, vary(asked[0], lang, dice), asked[1])


def ask_several(
    scene: Scene,
    tasks: dict[str, float],
    dice: Random,
    n: int,
    focus: Group | None = None,
    *,
    spread: bool = True,
) -> list[Turn]:
    """`n` turns or a few less; `tasks` gives weights. `spread`: over different tasks first;
    else no two with the same answer, which is about the same thing in other words."""
    turns: list[Turn] = []
    left = dict(tasks)
    for _ in range(4 * n):
        if len(turns) == n:
            break
        if not left:
            left = dict(tasks)
        task = dice.choices(list(left), list(left.values()))[0]
        if spread:
            del left[task]
        turn = ask(task, scene, dice, focus)
        told = 2 if spread else 3
        if turn and all(turn[told] != t[told] for t in turns):
            turns.append(turn)
    return turns
