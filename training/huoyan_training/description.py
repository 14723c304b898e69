"""Sentences that say what a picture shows, and the ways of asking for them."""

from __future__ import annotations

from .example import KINDS
from .language import DOINGS, PLACE_ORDER, backdrop_noun, be, capital, listed, on_backdrop, place, some
from .scene import OBJECT_COLOURS, Group, Scene

DESCRIBE = {
    "zh": (
        "请描述这张图片", "请描述这张图片。", "描述一下这张图片。", "这张图片里有什么？",
        "图片的内容是什么？",
        "这幅图画了什么？", "请用一句话描述这张图。", "你看到了什么？", "说说图中的内容。", "图里有什么？",
    ),
    "en": (
        "Describe this picture.", "What is the content of this image?", "Please describe the image.",
        "What do you see?", "What is in this picture?", "Describe the image in one sentence.",
        "Tell me what is in the image.", "What does this picture show?", "Can you describe this image?",
        "What is in the image?",
    ),
}  # fmt: skip


def ordered(groups: list[Group]) -> list[Group]:
    """Reading order of the places; groups all over the picture come last."""
    return sorted(
        groups,
        key=lambda g: (
            PLACE_ORDER.get(g.place or "", 99),
            KINDS.index(g.kind),
            OBJECT_COLOURS.index(g.colour),
        ),
    )


def one_group_sentence(group: Group, backdrop: str, lang: str) -> str:
    """The sentence for a picture of one kind of thing: what it does there, or that it is there."""
    what = some(group.kind, group.colour, group.count, lang)
    there = on_backdrop(backdrop, lang)
    doing = DOINGS.get((group.kind, backdrop))
    if lang == "zh":
        if doing:
            return f"{what}在{there}{doing[1]}。"
        return f"{there}有{what}。"
    if doing:
        return f"{capital(what)} {be(group.count)} {doing[0]} {there}."
    return f"There {be(group.count)} {what} {there}."


def sign_sentence(scene: Scene, lang: str) -> str:
    sign = scene.signs[0]
    there = on_backdrop(scene.backdrop, lang)
    if lang == "zh":
        return f"{there}有一块写着“{sign.text}”的牌子。" if sign.board else f"{there}写着“{sign.text}”。"
    if sign.board:
        return f'There is a sign that says "{sign.text}" {there}.'
    return f'The text "{sign.text}" is {there}.'


def description(scene: Scene, lang: str) -> str:
    """One or two sentences: every group with count, colour and place, then the backdrop."""
    if scene.signs:
        first = sign_sentence(scene, lang)
        if not scene.groups:
            return first
        parts = [located(g, lang) for g in ordered(scene.groups)]
        if lang == "zh":
            return first[:-1] + "，" + listed(parts, lang) + "。"
        return first[:-1] + f", and there {be(ordered(scene.groups)[0].count)} {listed(parts, lang)}."
    if len(scene.groups) == 1:
        return one_group_sentence(scene.groups[0], scene.backdrop, lang)
    groups = ordered(scene.groups)
    parts = [located(g, lang) for g in groups]
    back = backdrop_noun(scene.backdrop, lang)
    if lang == "zh":
        # "also" needs something before it.
        first = listed(parts, lang).replace("还有", "图中有", 0 if groups[0].place else 1)
        return f"{first}，背景是{back}。"
    return f"There {be(groups[0].count)} {listed(parts, lang)}. The background is {back}."


def located(group: Group, lang: str) -> str:
    what = some(group.kind, group.colour, group.count, lang)
    if lang == "zh":
        return f"{place(group.place, lang)}有{what}" if group.place else f"还有{what}"
    return f"{what} {place(group.place, lang)}" if group.place else what
