"""The generator: same seed same example, honest answers, splits that do not meet, room between things."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import numpy as np
import pytest

from huoyan_training.description import description
from huoyan_training.example import CHARACTERS, CLASSES, COLOURS, KINDS, Example
from huoyan_training.families import FAMILIES, QUESTIONS, sample, sample_any
from huoyan_training.language import COLOUR_ZH, NOUNS, NUMBERS_EN, NUMBERS_ZH
from huoyan_training.painter import texts_only
from huoyan_training.scene import cell_of, draw_scene
from huoyan_training.shapes import SHAPES
from huoyan_training.splits import (
    SPLITS,
    UNSEEN_COLOUR,
    UNSEEN_COUNT,
    belongs_to_heldout,
    unseen_pair,
    word_split,
)
from huoyan_training.words import slice_grid

DRAWN = [family for family in FAMILIES if family != "chat"]
TIMES = {"slice": 3, "motion": 6, "three": 6}


def examples(seed: int, family: str, split: str, times: int | None = None) -> list[Example]:
    rng = np.random.default_rng([seed, *family.encode()])
    return [sample(rng, family, split) for _ in range(times or TIMES.get(family, 25))]


def things(example: Example, picture: int = 0) -> Counter[tuple[str, str]]:
    """{(kind, colour): how many} from the marks alone."""
    return Counter(
        (CLASSES[m.kind], COLOURS[m.colour]) for m in example.marks[picture] if CLASSES[m.kind] in KINDS
    )


def printed(example: Example) -> str:
    return "".join(CLASSES[m.kind] for m in example.marks[0] if CLASSES[m.kind] in CHARACTERS)


def read(example: Example) -> list[str]:
    """What the answers to questions about print say, each word once."""
    words = (re.fullmatch(r'It says "(\w+)"\.|上面写着“(\w+)”。', answer) for _, answer in example.turns)
    return list(dict.fromkeys(m[1] or m[2] for m in words if m))


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_example(family: str, seed: int) -> None:
    for split in SPLITS:
        one, two = (sample(np.random.default_rng(seed), family, split) for _ in range(2))
        assert one.turns == two.turns
        assert one.tasks == two.tasks
        assert one.marks == two.marks
        assert all(np.array_equal(a, b) for a, b in zip(one.pictures, two.pictures, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_of_an_example(family: str, seed: int) -> None:
    for example in examples(seed, family, "train", 8):
        assert len(example.turns) == len(example.tasks) == len(example.languages) >= 1
        assert len(example.marks) == len(example.pictures)
        assert not example.unseen
        for pixels in example.pictures:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert 1 / 4.3 < pixels.shape[1] / pixels.shape[0] < 4.3
        for (question, answer), language in zip(example.turns, example.languages, strict=True):
            assert question.strip() == question
            assert answer[-1] in ".。！!"
            han = bool(re.search(r"[\u4e00-\u9fff]", answer))
            assert han == (language == "zh")
        counts = {"two": {2}, "three": {3}, "motion": set(range(2, 9)), "chat": {0}}.get(family, {1})
        assert len(example.pictures) in counts
        assert example.kind == ("video" if family == "motion" else "image")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="no family"):
        sample(np.random.default_rng(0), "nothing", "train")
    with pytest.raises(ValueError, match="split"):
        sample(np.random.default_rng(0), "what", "test")


@pytest.mark.parametrize("family", DRAWN)
def test_boxes_are_inside_and_hold_something(family: str, seed: int) -> None:
    for example in examples(seed, family, "train"):
        for pixels, marks in zip(example.pictures, example.marks, strict=True):
            height, width, _ = pixels.shape
            for mark in marks:
                x0, y0, x1, y1 = mark.box
                assert 0 <= x0 < x1 <= width
                assert 0 <= y0 < y1 <= height
                assert 0 < mark.kind < len(CLASSES)
                assert 0 < mark.colour < len(COLOURS)
                # A square without a rim fills its box evenly: what it stands out from is around it.
                patch = pixels[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2].astype(int)
                assert np.ptp(patch.reshape(-1, 3), axis=0).max() > 25, "nothing to see in the box"


@pytest.mark.parametrize("family", [*QUESTIONS, "two", "three"])
def test_things_are_large_and_apart(family: str, seed: int) -> None:
    for example in examples(seed, family, "train"):
        for pixels, marks in zip(example.pictures, example.marks, strict=True):
            unit = (pixels.shape[0] * pixels.shape[1]) ** 0.5 / 224
            boxes = [m.box for m in marks]
            for index, (x0, y0, x1, y1) in enumerate(boxes):
                assert max(x1 - x0, y1 - y0) >= 25 * unit
                for a0, b0, a1, b1 in boxes[:index]:
                    overlap = (min(x1, a1) - max(x0, a0), min(y1, b1) - max(y0, b0))
                    assert min(overlap) <= 0, "two things touch"


def test_splits_share_no_combination(seed: int) -> None:
    for family in (*QUESTIONS, "two", "three", "word"):
        for split in ("train", "heldout"):
            for example in examples(seed, family, split, 20):
                for k in range(len(example.pictures)):
                    found = things(example, k)
                    totals: Counter[str] = Counter()
                    for (kind, colour), count in found.items():
                        assert not unseen_pair(kind, colour, count), (family, split, kind, colour, count)
                        totals[kind] += count
                    assert all(UNSEEN_COUNT[kind] != n for kind, n in totals.items())
    for family in QUESTIONS:
        for example in examples(seed, family, "unseen", 12):
            found = things(example)
            totals = Counter()
            for (kind, _), count in found.items():
                totals[kind] += count
            assert example.unseen
            assert any(unseen_pair(*pair, count) for pair, count in found.items()) or any(
                UNSEEN_COUNT[kind] == n for kind, n in totals.items()
            )


def test_compositions_are_held_out(seed: int) -> None:
    dice = Random(seed)
    train = {draw_scene(dice, "train").signature() for _ in range(300)}
    heldout = {draw_scene(dice, "heldout").signature() for _ in range(60)}
    assert not train & heldout
    assert not any(belongs_to_heldout(s) for s in train)
    assert all(belongs_to_heldout(s) for s in heldout)


@pytest.mark.parametrize("split", SPLITS)
def test_words_keep_to_their_split(split: str, seed: int) -> None:
    for family in ("word", "slice"):
        for example in examples(seed, family, split, 20 if family == "word" else 3):
            assert all(word_split(text) == split for text in read(example))


def test_unseen_tables() -> None:
    assert set(UNSEEN_COLOUR) == set(KINDS) == set(UNSEEN_COUNT) == set(SHAPES) == set(NOUNS)
    assert max(Counter(UNSEEN_COLOUR.values()).values()) <= 2
    assert set(UNSEEN_COUNT.values()) == {2, 3, 4, 5}


def count_asked(question: str, language: str) -> tuple[str, str | None] | None:
    """(kind or "thing", colour) that a counting question is about, read from the question alone."""
    if language == "zh":
        colour = next((c for c, zh in COLOUR_ZH.items() if zh in question), None)
        kind = next(
            (k for k in sorted(NOUNS, key=lambda k: -len(NOUNS[k].zh)) if NOUNS[k].zh in question), None
        )
        return ("thing" if "东西" in question else kind or "", colour)
    words = re.findall(r"[a-z]+", question.lower())
    colour = next((w for w in words if w in COLOUR_ZH), None)
    kind = next((k for k in KINDS if NOUNS[k].many in words), None)
    return ("thing" if "things" in words else kind or "", colour)


def test_counts_agree_with_the_marks(seed: int) -> None:
    checked: Counter[int] = Counter()
    for example in examples(seed, "count", "train", 110):
        found = things(example)
        for (question, answer), task, language in zip(
            example.turns, example.tasks, example.languages, strict=True
        ):
            if task != "count":
                continue
            kind, colour = count_asked(question, language) or ("", None)
            assert kind, question
            n = sum(c for (k, col), c in found.items() if kind in (k, "thing") and colour in (col, None))
            if language == "zh":
                said = (
                    0
                    if "没有" in answer
                    else next(i for i, z in enumerate(NUMBERS_ZH) if answer.startswith(f"图中有{z}"))
                )
            else:
                said = NUMBERS_EN.index(answer.split()[2])
            assert said == n, (question, answer, found)
            checked[n] += 1
    assert sum(checked.values()) >= 80
    assert set(range(4)) <= set(checked)


def test_colours_and_places_agree_with_the_marks(seed: int) -> None:
    checked = Counter()
    for family in ("colour", "where"):
        for example in examples(seed, family, "train", 120):
            height, width, _ = example.pictures[0].shape
            for (question, answer), task, language in zip(
                example.turns, example.tasks, example.languages, strict=True
            ):
                if language != "en":
                    continue
                if task == "colour" and (
                    m := re.fullmatch(r"The (\w+) (?:is|are) (?:wearing )?(\w+)\.", answer)
                ):
                    kind = next(k for k in KINDS if m[1] in (NOUNS[k].one, NOUNS[k].many))
                    assert {c for k, c in things(example) if k == kind} == {m[2]}
                    checked[task] += 1
                m = re.fullmatch(
                    r"The (?:(\w+) )?(\w+)(?: in (\w+))? is (?:on|at|in) the (.+?)(?: corner)?\.", answer
                )
                if (
                    task == "where"
                    and m
                    and "of" not in answer
                    and m[4] in ("left", "right", "top", "bottom", "middle")
                ):
                    kind = next(k for k in KINDS if m[2] == NOUNS[k].one)
                    colour = m[1] or m[3]
                    boxes = [
                        mark.box for mark in example.marks[0]
                        if CLASSES[mark.kind] == kind and (not colour or COLOURS[mark.colour] == colour)
                    ]  # fmt: skip
                    assert len(boxes) == 1
                    x0, y0, x1, y1 = boxes[0]
                    assert cell_of((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, 0.0) == m[4], question
                    checked[task] += 1
    assert checked["colour"] > 20
    assert checked["where"] > 10


def test_existence_agrees_with_the_marks(seed: int) -> None:
    seen = Counter()
    for example in examples(seed, "exists", "train", 120):
        found = things(example)
        for (question, answer), task, language in zip(
            example.turns, example.tasks, example.languages, strict=True
        ):
            words = re.findall(r"[a-z]+", question.lower())
            if task != "exists" or language != "en" or (words[0] in ("is", "are") and words[1] == "the"):
                continue
            kind = next(k for k in KINDS if NOUNS[k].one in words or NOUNS[k].many in words)
            colour = next((w for w in words if w in COLOUR_ZH), None)
            there = any(k == kind and colour in (None, c) for k, c in found)
            assert answer.startswith("Yes") == there, (question, answer, found)
            seen[there] += 1
    assert min(seen[True], seen[False]) > 8


def test_printed_words_are_the_answer(seed: int) -> None:
    for family in ("word", "slice"):
        for example in examples(seed, family, "train", 40 if family == "word" else 4):
            if family == "word":
                assert all(
                    '"' in a or "“" in a
                    for (_, a), t in zip(example.turns, example.tasks, strict=True)
                    if t == family
                )
            # Training pictures may have several signs, which are asked for in the order they are painted in.
            assert "".join(read(example)) == printed(example)


def test_training_prints_several_words_and_asks_for_each_by_its_place(seed: int) -> None:
    found = {}
    for split in ("train", "heldout"):
        found[split] = [
            len({a for (_, a), task in zip(e.turns, e.tasks, strict=True) if task == "word" and '"' in a})
            for e in examples(seed, "word", split, 40)
        ]
    assert 3 <= sum(n > 1 for n in found["train"]) <= 25
    assert max(found["heldout"]) == 1


def test_training_asks_of_each_thing_whether_it_changed(seed: int) -> None:
    same = Counter[bool]()
    for example in examples(seed, "two", "train", 120):
        for question, answer in example.turns:
            if re.search("has changed about|Did .* change", question):
                same["not changed" in answer] += 1
                assert "changed" in answer or " moved from " in answer
    assert min(same[True], same[False]) > 3
    heldout = examples(seed, "two", "heldout", 20)
    assert not any("not changed" in answer for example in heldout for _, answer in example.turns)


def test_letters_are_legible(seed: int) -> None:
    """Capitals and digits are 12 pixels high at least where they are read: in the overview, or in a slice."""
    for family in ("word", "slice"):
        for example in examples(seed, family, "train", 30 if family == "word" else 5):
            height, width, _ = example.pictures[0].shape
            columns, rows = slice_grid(width, height) if family == "slice" else (1, 1)
            unit = (width * height / (columns * rows)) ** 0.5 / 224
            tall = [
                m.box[3] - m.box[1]
                for m in example.marks[0]
                if (c := CLASSES[m.kind]) in CHARACTERS and (c.isupper() or c.isdigit())
            ]
            assert all(h / unit >= 12 for h in tall)


def test_small_print_needs_the_slices(seed: int) -> None:
    for example in examples(seed, "slice", "train", 6):
        height, width, _ = example.pictures[0].shape
        assert max(width, height) <= 1345
        overview = (width * height) ** 0.5 / 224
        boxes = [m.box for m in example.marks[0] if CLASSES[m.kind] in CHARACTERS]
        assert all((b[3] - b[1]) / overview < 12 for b in boxes)
        columns, rows = slice_grid(width, height)
        cells = {
            (int(b[k] * columns / width), int(b[l] * rows / height))
            for b in boxes
            for k, l in ((0, 1), (2, 3))
        }
        assert len(cells) <= 1, "the word is cut by a slice border"


def centre(example: Example, picture: int, kind: str, colour: str) -> tuple[float, float]:
    boxes = [m.box for m in example.marks[picture] if (CLASSES[m.kind], COLOURS[m.colour]) == (kind, colour)]
    return (boxes[0][0] + boxes[0][2]) / 2, (boxes[0][1] + boxes[0][3]) / 2


def test_motion_goes_where_the_answer_says(seed: int) -> None:
    ways = {"向右": (1, 0), "向左": (-1, 0), "向下": (0, 1), "向上": (0, -1)}
    checked = 0
    for example in examples(seed, "motion", "train", 25):
        whole = "".join(a for _, a in example.turns)
        still = (
            "Nothing moves" in whole or "没有东西在移动" in whole or "not move" in whole or "没有动" in whole
        )
        first, last = example.marks[0], example.marks[-1]
        if still:
            assert first == last
            continue
        mover = next(k for k, (a, b) in enumerate(zip(first, last, strict=True)) if a.box != b.box)
        assert sum(a.box != b.box for a, b in zip(first, last, strict=True)) == 1
        (x0, y0), (x1, y1) = (
            ((m.box[0] + m.box[2]) / 2, (m.box[1] + m.box[3]) / 2) for m in (first[mover], last[mover])
        )
        for (_, answer), language in zip(example.turns, example.languages, strict=True):
            if language == "zh":
                dx, dy = next(v for k, v in ways.items() if k in answer)
                assert (x1 - x0) * dx + (y1 - y0) * dy > 20
                checked += 1
    assert checked > 10


def test_more_and_fewer_agree_with_the_marks(seed: int) -> None:
    checked = 0
    for example in examples(seed, "two", "train", 80):
        for question, answer in example.turns:
            m = re.search(r"(more|fewer) (\w+)", question)
            if not m or "icture" not in answer:
                continue
            kind = next(k for k in KINDS if NOUNS[k].many == m[2])
            a, b = (sum(n for (k, _), n in things(example, i).items() if k == kind) for i in (0, 1))
            if a == b:
                assert "same number" in answer
            else:
                assert f"The {'first' if (a > b) == (m[1] == 'more') else 'second'} picture" in answer
            checked += 1
    assert checked > 10


def test_changes_agree_with_the_marks(seed: int) -> None:
    seen: Counter[str] = Counter()
    for example in examples(seed, "two", "train", 250):
        before, after = things(example, 0), things(example, 1)
        for _, answer in example.turns:
            if answer == "Nothing changed.":
                assert example.marks[0] == example.marks[1]
                seen["nothing"] += 1
            elif answer.endswith((" added.", " removed.")):
                gone, come = before - after, after - before
                group = come if answer.endswith(" added.") else gone
                (((kind, colour), count),) = group.items()
                assert colour in answer
                assert (NOUNS[kind].one if count == 1 else NOUNS[kind].many) in answer
                assert count == 1 or NUMBERS_EN[count] in answer.lower()
                seen["added or removed"] += 1
            elif " changed from " in answer:
                old, new = re.search(r"from (\w+) to (\w+)", answer).groups()  # type: ignore[union-attr]
                assert {c for _, c in before - after} == {old}
                assert {c for _, c in after - before} == {new}
                seen["recoloured"] += 1
            elif " moved from " in answer:
                assert before == after
                assert sum(a != b for a, b in zip(*example.marks, strict=True)) == 1
                seen["moved"] += 1
    assert len(seen) == 4


def test_every_family_comes_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    with texts_only():
        found = Counter(sample_any(rng, "train")[0] for _ in range(600))
    assert set(found) == set(FAMILIES)


def test_ordinary_pictures_are_one_slice(seed: int) -> None:
    found = [examples(seed, family, "train") for family in QUESTIONS]
    sizes = [e.pictures[0].shape for group in found for e in group]
    sliced = sum(h * w > 224 * 224 for h, w, _ in sizes)
    assert 0 < sliced < 0.25 * len(sizes)


def test_a_description_never_starts_with_also(seed: int) -> None:
    dice = Random(seed)
    answers = [description(draw_scene(dice, "train"), "zh") for _ in range(4000)]
    assert not any(a.startswith("还有") for a in answers)
    assert any("还有" in a for a in answers)
    assert any(a.startswith("图中有") and "背景" in a for a in answers)


def test_training_asks_the_same_of_several_things(seed):
    """Held-out pictures are asked one question of a kind; in training the next one is about another thing."""
    most = 0
    for k in range(20):
        example = sample(np.random.default_rng(seed + k), "where", "train")
        said = [answer for _, answer in example.turns]
        assert len(set(said)) == len(said)
        answers = {a for (_, a), task in zip(example.turns, example.tasks, strict=True) if task == "where"}
        most = max(most, len(answers))
    assert most >= 3


def test_training_asks_which_of_two_has_more_and_which_has_fewer(seed):
    for k in range(20):
        example = sample(np.random.default_rng(seed + k), "two", "train")
        answers = " ".join(answer for _, answer in example.turns)
        if "has fewer" in answers or "has more" in answers:
            assert "has fewer" in answers
            assert "has more" in answers
