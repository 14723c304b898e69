"""Two or three pictures at once: what changed, which has more, which shows something."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from .description import description
from .language import (
    COLOUR_ZH,
    LANGUAGES,
    NOUNS,
    NUMBERS_EN,
    NUMBERS_ZH,
    ORDINALS,
    be,
    capital,
    place,
    some,
    the,
    vary,
)
from .painter import paint
from .questions import Made, Turn
from .scene import (
    CELLS,
    Group,
    NoRoom,
    Scene,
    arrange,
    cell_of,
    choose_backdrop,
    choose_colour,
    choose_count,
    choose_kind,
    draw_scene,
    picture_size,
    rows_for,
)  # fmt: skip
from .splits import UNSEEN_COUNT, belongs_to_heldout, unseen_pair

Said = tuple[list[str], str]  # phrasings of the question, answer

CHANGE_ZH = [
    "两张图片有什么不同？",
    "两张图有什么变化？",
    "第二张图片和第一张相比有什么变化？",
    "发生了什么变化？",
    "两幅图的区别是什么？",
    "有什么不一样？",
]
CHANGE_EN = [
    "What changed?", "What is different between the two pictures?", "What is the difference?",
    "What has changed?",
    "Compare the two images: what changed?", "What changed in the second picture?",
]  # fmt: skip


def turn(task: str, lang: str, said: Said, dice: Random) -> Turn:
    return task, lang, vary(dice.choice(said[0]), lang, dice), said[1]


def small_size(dice: Random) -> tuple[int, int]:
    """One-slice pictures: several share a prompt."""
    return picture_size(dice, False)


def say_change(change: str, before: Scene, after: Scene, index: int, lang: str) -> str:
    """The answer to "what changed?" when group `index` of the fuller scene was changed."""
    zh = lang == "zh"
    if change == "nothing":
        return "没有变化。" if zh else "Nothing changed."
    if change in ("added", "removed"):
        g = (after if change == "added" else before).groups[index]
        what = some(g.kind, g.colour, g.count, lang)
        if zh:
            return f"{'多' if change == 'added' else '少'}了{what}。"
        return f"{capital(what)} {'was' if g.count == 1 else 'were'} {change}."
    g, h = before.groups[index], after.groups[index]
    if change == "recoloured":
        name = the(g.kind, None, g.count, lang)
        if zh:
            return f"{name}从{COLOUR_ZH[g.colour]}变成了{COLOUR_ZH[h.colour]}。"
        return f"{capital(name)} changed from {g.colour} to {h.colour}."
    name = the(g.kind, None if len(before.of_kind(g.kind)) == 1 else g.colour, g.count, lang)
    assert g.place
    assert h.place
    if zh:
        return f"{name}从{place(g.place, lang)}移到了{place(h.place, lang)}。"
    return f"{capital(name)} moved from {NOUN_PLACES[g.place]} to {NOUN_PLACES[h.place]}."


NOUN_PLACES = {
    "top left": "the top left corner", "top": "the top", "top right": "the top right corner",
    "left": "the left",
    "middle": "the middle", "right": "the right", "bottom left": "the bottom left corner",
    "bottom": "the bottom",
    "bottom right": "the bottom right corner",
}  # fmt: skip


def without(scene: Scene, index: int) -> Scene:
    less = scene.copy()
    del less.groups[index]
    return less


def moved(scene: Scene, index: int, dice: Random) -> Scene | None:
    """The single thing `index` in another ninth of the picture, clear of the others."""
    other = scene.copy()
    g = other.groups[index]
    t = g.things[0]
    rows = rows_for(g.kind, scene)
    half = t.size / 2 + scene.unit
    for _ in range(30):
        x, y = dice.uniform(half, scene.width - half), dice.uniform(half, scene.height - half)
        cell = cell_of(x / scene.width, y / scene.height)
        row = CELLS[1][int(min(y / scene.height, 0.999) * 3)]
        far = max(abs(x - t.x), abs(y - t.y)) > 0.3 * min(scene.width, scene.height)
        clear = all(
            max(abs(x - o.x), abs(y - o.y)) > (t.size + o.size) / 2 + 4 * scene.unit
            for h in other.groups if h is not g for o in h.things
        )  # fmt: skip
        taken = {h.place for h in other.groups if h.count == 1}
        if cell and cell not in taken and cell != g.place and row in rows and far and clear:
            t.x, t.y, g.place = x, y, cell
            return other
    return None


def _strange(group: Group, split: str) -> bool:
    return (split == "unseen") == unseen_pair(group.kind, group.colour, group.count)


CHANGES = ("added", "removed", "recoloured", "moved", "nothing")
CHANGE_SHARES, CHANGE_LESSONS = (25, 25, 20, 20, 10), (15, 15, 30, 26, 14)
"""As they are asked, and as they are taught: another colour and another place are seen last."""


def changed_pair(dice: Random, split: str) -> tuple[Scene, Scene, str, int]:
    """Before, after, the name of the change and the index of the changed group."""
    shares = CHANGE_LESSONS if split == "train" else CHANGE_SHARES
    while True:
        full = draw_scene(dice, split, 3, small_size(dice))
        index = 0 if split == "unseen" else dice.randrange(len(full.groups))
        g = full.groups[index]
        if not _strange(g, split):
            continue
        change = dice.choices(CHANGES, shares)[0]
        if change in ("added", "removed"):
            if len(full.groups) < 2 and dice.random() < 0.7:
                continue
            less = without(full, index)
            return (less, full, change, index) if change == "added" else (full, less, change, index)
        if change == "nothing":
            return full, full.copy(), change, index
        if change == "recoloured":
            colour = choose_colour(dice, g.kind, full.backdrop)
            if len(full.of_kind(g.kind)) > 1 or colour in (None, g.colour):
                continue
            after = full.copy()
            after.groups[index] = replace(after.groups[index], colour=str(colour))
            # Lines may be too faint in the new colour.
            for thing in (*g.things, *after.groups[index].things):
                if thing.look.style == "outline":
                    thing.look = replace(thing.look, style="edged")
            return full, after, change, index
        if g.count == 1:
            other = moved(full, index, dice)
            if other:
                return full, other, change, index


def change_turns(dice: Random, before: Scene, after: Scene, change: str, index: int) -> list[Turn]:
    asked = {"zh": CHANGE_ZH, "en": CHANGE_EN}
    turns = [
        turn("two", lang, (asked[lang], say_change(change, before, after, index, lang)), dice)
        for lang in LANGUAGES
    ]
    lang = dice.choice(LANGUAGES)
    which = dice.randrange(2)
    scene = (before, after)[which]
    if scene.groups:
        turns.append(turn("content", lang, ask_content(scene, which, lang), dice))
    lang = dice.choice(LANGUAGES)
    if lang == "zh":
        said = (
            ["两张图片一样吗？", "两张图片相同吗？", "两张图是不是一样的？"],
            "一样。" if change == "nothing" else "不一样。",
        )
    else:
        said = (
            ["Are the two pictures the same?", "Are both pictures the same?", "Are the images identical?"],
            "Yes, they are the same." if change == "nothing" else "No, they are different.",
        )
    if dice.random() < (1.0 if change == "nothing" else 0.3):
        turns.append(turn("two", lang, said, dice))
    return turns


def same_turns(dice: Random, before: Scene, after: Scene, change: str, index: int) -> list[Turn]:
    """For training: of each thing that is in both pictures, whether it is another now. What changed is found by
    comparing them all; of a crowd that one question teaches little about the others."""
    if change == "recoloured":
        fixed = [(k, g) for k, g in enumerate(before.groups) if len(before.of_kind(g.kind)) == 1]
    else:
        fixed = [(k, g) for k, g in enumerate(before.groups) if change != "removed" or k != index]
    turns: list[Turn] = []
    for k, g in fixed:
        alone = len(before.of_kind(g.kind)) == len(after.of_kind(g.kind)) == 1
        colour = None if alone else g.colour
        if k == index and change in ("recoloured", "moved"):
            answers = {lang: say_change(change, before, after, index, lang) for lang in LANGUAGES}
        else:
            have = "has" if g.count == 1 else "have"
            answers = {
                "zh": f"{the(g.kind, colour, g.count, 'zh')}没有变化。",
                "en": f"{capital(the(g.kind, colour, g.count, 'en'))} {have} not changed.",
            }
        lang = dice.choice(LANGUAGES)
        name = the(g.kind, colour, g.count, lang)
        questions = (
            [f"{name}有什么变化？", f"{name}有变化吗？"]
            if lang == "zh"
            else [f"What has changed about {name}?", f"Did {name} change?"]
        )
        turns.append(turn("two", lang, (questions, answers[lang]), dice))
    return turns


def more_turns(dice: Random, scenes: list[Scene], most: int = 6) -> list[Turn]:
    """Further questions about several pictures, for training: which shows a thing, how many are in one."""
    turns: list[Turn] = []
    task = "two" if len(scenes) == 2 else "three"
    for which, scene in enumerate(scenes):
        others = [s for s in scenes if s is not scene]
        for g in scene.groups:
            lang = dice.choice(LANGUAGES)
            if not any(s.of_kind(g.kind) for s in others):
                colour = g.colour if dice.random() < 0.3 else None
                turns.append(turn(task, lang, ask_which(g.kind, colour, which, lang), dice))
            elif not any(s.total(g.kind, g.colour) for s in others):
                turns.append(turn(task, lang, ask_which(g.kind, g.colour, which, lang), dice))
            count = scene.total(g.kind)
            if count <= 5:
                turns.append(turn(task, lang, ask_count_in(g.kind, count, which, lang), dice))
    return dice.sample(turns, min(most, len(turns)))


def ask_content(scene: Scene, which: int, lang: str) -> Said:
    en, zh = ORDINALS[which]
    if lang == "zh":
        return [f"{zh}张图片里有什么？", f"请描述{zh}张图片。", f"{zh}张图是什么？"], description(scene, lang)
    questions = [
        f"What is in the {en} picture?",
        f"Describe the {en} picture.",
        f"What does the {en} image show?",
    ]
    return questions, description(scene, lang)


def ask_more(kind: str, a: int, b: int, fewer: bool, lang: str) -> Said:
    n = NOUNS[kind]
    if lang == "zh":
        word = "少" if fewer else "多"
        q = [
            f"哪张图片里的{n.zh}更{word}？",
            f"哪张图的{n.zh}{word}？",
            f"哪一张图片的{n.zh}更{word}？",
            f"两张图片中，哪张的{n.zh}更{word}？",
        ]
        if a == b:
            return q, f"两张图片里的{n.zh}一样多。"
        return q, f"{ORDINALS[int((a < b) != fewer)][1]}张图片里的{n.zh}更{word}。"
    word = "fewer" if fewer else "more"
    q = [
        f"Which picture has {word} {n.many}?",
        f"Which image has {word} {n.many}?",
        f"In which picture are there {word} {n.many}?",
        f"Which one has {word} {n.many}?",
    ]
    if a == b:
        return q, f"Both pictures have the same number of {n.many}."
    return q, f"The {ORDINALS[int((a < b) != fewer)][0]} picture has {word} {n.many}."


def ask_count_in(kind: str, count: int, which: int, lang: str) -> Said:
    en, zh = ORDINALS[which]
    n = NOUNS[kind]
    if lang == "zh":
        answer = (
            f"{zh}张图片里有{NUMBERS_ZH[count]}{n.measure}{n.zh}。" if count else f"{zh}张图片里没有{n.zh}。"
        )
        return [f"{zh}张图片里有几{n.measure}{n.zh}？", f"{zh}张图里有多少{n.measure}{n.zh}？"], answer
    thing = n.one if count == 1 else n.many
    q = [f"How many {n.many} are in the {en} picture?", f"How many {n.many} does the {en} image show?"]
    return q, f"There {be(count)} {NUMBERS_EN[count]} {thing} in the {en} picture."


def counted_scene(
    dice: Random, split: str, kind: str, count: int, backdrop: str, size: tuple[int, int]
) -> Scene:
    """Exactly `count` of the kind in one colour, and now and then something else. Raises NoRoom."""
    scene = Scene(*size, backdrop, dice.randrange(1 << 30))
    wanted: list[tuple[str, str, int]] = []
    if count:
        colour = choose_colour(dice, kind, backdrop)
        if colour is None:
            raise NoRoom
        wanted.append((kind, colour, count))
    if not wanted or dice.random() < 0.35:
        other = choose_kind(dice, backdrop)
        colour = choose_colour(dice, other, backdrop)
        if other == kind or colour is None:
            raise NoRoom
        wanted.append((other, colour, choose_count(dice, other, 3)))
    arrange(scene, wanted, dice)
    return scene


def more_example(dice: Random, split: str) -> Made:
    while True:
        backdrop, size = choose_backdrop(dice), small_size(dice)
        kind = choose_kind(dice, backdrop)
        other_backdrop = backdrop if dice.random() < 0.5 else choose_backdrop(dice)
        a = choose_count(dice, kind) if dice.random() < 0.8 else dice.randint(0, 5)
        b = a if dice.random() < 0.2 else dice.randint(0, 5)
        strange = UNSEEN_COUNT[kind]
        if split == "unseen":
            a, b = (strange, b) if dice.random() < 0.5 else (a, strange)
        elif strange in (a, b):
            continue
        if a == b == 0:
            continue
        try:
            scenes = (
                counted_scene(dice, split, kind, a, backdrop, size),
                counted_scene(
                    dice, split, kind, b, other_backdrop, size if dice.random() < 0.5 else small_size(dice)
                ),
            )
        except NoRoom:
            continue
        if not allowed(list(scenes), split):
            continue
        both = (scenes[0].signature(), scenes[1].signature())
        if split == "unseen" or belongs_to_heldout(both) == (split == "heldout"):
            break
    turns = [turn("two", lang, ask_more(kind, a, b, dice.random() < 0.25, lang), dice) for lang in LANGUAGES]
    which = dice.randrange(2)
    lang = dice.choice(LANGUAGES)
    turns.append(turn("two", lang, ask_count_in(kind, (a, b)[which], which, lang), dice))
    which, lang = dice.randrange(2), dice.choice(LANGUAGES)
    turns.append(turn("content", lang, ask_content(scenes[which], which, lang), dice))
    if split == "train":
        # Both words, so that neither picture is the answer more often.
        turns += [
            turn("two", lang, ask_more(kind, a, b, fewer, lang), dice)
            for lang in LANGUAGES
            for fewer in (False, True)
        ]
        turns += more_turns(dice, list(scenes))
    return finish(list(scenes), turns, split)


def allowed(scenes: list[Scene], split: str) -> bool:
    """No training picture shows a composition that is held out or unseen."""
    return split != "train" or not any(
        s.has_unseen() or (s.groups and belongs_to_heldout(s.signature())) for s in scenes
    )


def finish(scenes: list[Scene], turns: list[Turn], split: str) -> Made:
    painted = [paint(s, s.seed + 7 * k) for k, s in enumerate(scenes)]
    return Made([p for p, _ in painted], turns, [m for _, m in painted], unseen=split == "unseen")


def two_example(dice: Random, split: str) -> Made:
    # What changed is learned later than what is more.
    if dice.random() < (0.25 if split == "train" else 0.45):
        return more_example(dice, split)
    while True:
        before, after, change, index = changed_pair(dice, split)
        if allowed([before, after], split):
            break
    turns = change_turns(dice, before, after, change, index)
    if split == "train":
        turns += same_turns(dice, before, after, change, index)
        turns += more_turns(dice, [before, after], 2)
    return finish([before, after], turns, split)


def ask_which(kind: str, colour: str | None, which: int, lang: str) -> Said:
    en, zh = ORDINALS[which]
    what = some(kind, colour, 1, lang)
    from .language import kinds_of

    if lang == "zh":
        name = kinds_of(kind, colour, lang)
        return [
            f"哪张图片里有{name}？",
            f"{name}在哪张图片里？",
            f"第几张图片里有{name}？",
        ], f"{zh}张图片里有{name}。"
    return [
        f"Which picture shows {what}?",
        f"Which picture has {what}?",
        f"In which image is {what}?",
    ], f"The {en} picture has {what}."


def three_example(dice: Random, split: str) -> Made:
    """Three pictures of one group each (one thing, mostly); all three belong to the split."""
    while True:
        scenes = [
            draw_scene(dice, split if k == 0 or split != "unseen" else "train", 1, small_size(dice))
            for k in range(3)
        ]
        dice.shuffle(scenes)
        if (
            len({s.groups[0].kind for s in scenes}) > 1
            and len({(s.groups[0].kind, s.groups[0].colour) for s in scenes}) == 3
        ):
            break
    turns: list[Turn] = []
    kinds = [s.groups[0].kind for s in scenes]
    for lang in LANGUAGES:
        which = dice.randrange(3)
        if split == "unseen":
            which = next(k for k, s in enumerate(scenes) if s.has_unseen())
        g = scenes[which].groups[0]
        colour = None if kinds.count(g.kind) == 1 and dice.random() < 0.7 else g.colour
        turns.append(turn("three", lang, ask_which(g.kind, colour, which, lang), dice))
        which = dice.randrange(3)
        turns.append(turn("content", lang, ask_content(scenes[which], which, lang), dice))
    if split == "train":
        turns += more_turns(dice, scenes)
    return finish(scenes, turns, split)
