"""Is an answer right? Exact words for everything but descriptions, which are held to their facts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from huoyan_training.language import BACKDROPS, COLOUR_ZH, NOUNS, PLACES

_NUMBERS_EN = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_NUMBERS_ZH = {"一": 1, "两": 2, "二": 2, "三": 3, "四": 4, "五": 5}
_MEASURES = "".join(sorted({n.measure for n in NOUNS.values()}))

_KIND_EN = {word: kind for kind, n in NOUNS.items() for word in (n.one, n.many)}
_KIND_ZH = {n.zh: kind for kind, n in NOUNS.items()}
_COLOUR_OF_ZH = {zh: en for en, zh in COLOUR_ZH.items()}


def _any(words: list[str]) -> str:
    return "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))


_THING_EN = re.compile(
    rf"\b({_any(list(_NUMBERS_EN))}) (?:({_any(list(COLOUR_ZH))}) )?({_any(list(_KIND_EN))})\b"
    rf"(?: in ({_any(list(COLOUR_ZH))}))?"
)
_THING_ZH = re.compile(
    rf"([{''.join(_NUMBERS_ZH)}])[{_MEASURES}](?:穿?({_any(list(_COLOUR_OF_ZH))})(?:的|衣服的))?({_any(list(_KIND_ZH))})"
)
_QUOTED = re.compile(r"[\"“]([^\"”]*)[\"”]")

Fact = tuple[str, ...]

DESCRIPTIONS = ("describe", "content")
"""Tasks answered by a description: of the picture, or of one of several."""


def normalise(text: str) -> str:
    """Full-width forms, case, outer spaces, runs of spaces and the final mark do not matter."""
    text = unicodedata.normalize("NFKC", text).strip().casefold()
    return re.sub(r"\s+", " ", text).rstrip(".。!?,")


def exact(answer: str, reference: str) -> bool:
    """The same words. Printed text inside quotation marks is compared with its case."""
    return normalise(answer) == normalise(reference) and _QUOTED.findall(answer) == _QUOTED.findall(reference)


def facts(text: str, language: str) -> Counter[Fact]:
    """What a description claims: things (with colour and count), places, the backdrop, printed words."""
    found: Counter[Fact] = Counter()
    for word in _QUOTED.findall(text):
        found["text", word] += 1
    plain = normalise(_QUOTED.sub(" ", text))
    if language == "zh":
        for number, colour, kind in _THING_ZH.findall(plain):
            _add_thing(found, _KIND_ZH[kind], _COLOUR_OF_ZH.get(colour, ""), _NUMBERS_ZH[number])
        column, backdrop_column = 1, 2
    else:
        for number, colour, kind, worn in _THING_EN.findall(plain):
            _add_thing(found, _KIND_EN[kind], colour or worn, _NUMBERS_EN[number])
        column, backdrop_column = 0, 0
    # The longest name first: "the top left corner" is not also "the top".
    rest = plain
    for name in sorted(PLACES, key=lambda n: -len(PLACES[n][column])):
        phrase = PLACES[name][column]
        if phrase in rest:
            found["place", name] += rest.count(phrase)
            rest = rest.replace(phrase, " ")
    for name in sorted(BACKDROPS, key=lambda n: -len(BACKDROPS[n][backdrop_column])):
        phrase = BACKDROPS[name][backdrop_column].removeprefix("the ").removeprefix("a ")
        if re.search(rf"\b{phrase}\b" if language == "en" else phrase, rest):
            found["backdrop", name] += 1
            break
    return found


def _add_thing(found: Counter[Fact], kind: str, colour: str, number: int) -> None:
    found["kind", kind] += 1
    found["count", kind, str(number)] += 1
    if colour:
        found["colour", kind, colour] += 1


def fact_score(answer: str, reference: str, language: str) -> float:
    """Share of the reference's and the answer's facts that agree (their harmonic mean, from 0 to 1)."""
    wanted, given = facts(reference, language), facts(answer, language)
    total = wanted.total() + given.total()
    if total == 0:
        return float(exact(answer, reference))
    return 2 * (wanted & given).total() / total


def score(task: str, language: str, answer: str, reference: str) -> float:
    """1 for a right answer, 0 for a wrong one; a description's share of right facts."""
    if task in DESCRIPTIONS:
        return fact_score(answer, reference, language)
    return float(exact(answer, reference))


def words_named(text: str, language: str, what: str) -> set[str]:
    """The kinds, colours or numbers that a short answer names anywhere."""
    plain = normalise(text)
    if what == "kind":
        words: dict[str, str] = _KIND_ZH if language == "zh" else _KIND_EN
    elif what == "colour":
        words = _COLOUR_OF_ZH if language == "zh" else {c: c for c in COLOUR_ZH}
    else:
        numbers = _NUMBERS_ZH if language == "zh" else _NUMBERS_EN
        words = {w: str(n) for w, n in numbers.items()} | {str(n): str(n) for n in range(10)}
        words |= {"零": "0", "没有": "0"} if language == "zh" else {"no": "0", "none": "0", "zero": "0"}
    if language == "zh":
        if what == "count":
            # A triangle is not three of anything.
            plain = re.sub(_any(list(_KIND_ZH)), " ", plain)
        return {label for word, label in words.items() if word in plain}
    return {label for word, label in words.items() if re.search(rf"\b{re.escape(word)}\b", plain)}
