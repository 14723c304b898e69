from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from huoyan.prompt.stop_strings import StopStringMatcher

letters = st.text("ab句\n", max_size=30)
stops = st.lists(st.text("ab句\n", min_size=1, max_size=5), max_size=4)


def naive(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The text as it grows by characters: the first moment at which some stop string is complete."""
    for end in range(1, len(text) + 1):
        met = [s for s in stop if text[:end].endswith(s)]
        if met:
            longest = max(met, key=len)
            return (text[:end] if include else text[: end - len(longest)]), longest
    return text, None


def run(pieces: list[str], stop: list[str], include: bool = False) -> tuple[str, str | None, list[str]]:
    matcher = StopStringMatcher(stop, include)
    shown: list[str] = []
    for piece in pieces:
        result = matcher.push(piece)
        shown.append(result.text)
        if result.stop is not None:
            return "".join(shown), result.stop, shown
    shown.append(matcher.final())
    return "".join(shown), None, shown


@given(pieces=st.lists(letters, max_size=8), stop=stops, include=st.booleans())
@settings(max_examples=500, deadline=None)
def test_as_a_naive_search(pieces: list[str], stop: list[str], include: bool) -> None:
    text, met, _ = run(pieces, stop, include)
    assert (text, met) == naive("".join(pieces), stop, include)


@given(pieces=st.lists(letters, max_size=8), stop=stops)
@settings(max_examples=300, deadline=None)
def test_holds_back_no_more_than_needed(pieces: list[str], stop: list[str]) -> None:
    matcher = StopStringMatcher(stop)
    sent = shown = ""
    for piece in pieces:
        sent += piece
        result = matcher.push(piece)
        if result.stop is not None:
            break
        shown += result.text
        held = sent[len(shown) :]
        assert sent == shown + held
        beginnings = [
            n for n in range(len(sent) + 1) if any(s.startswith(sent[len(sent) - n :]) for s in stop)
        ]
        assert len(held) == max(beginnings, default=0)


def test_examples() -> None:
    assert run(["Hello <", "|im", "_end|> x"], ["<|im_end|>"])[:2] == ("Hello ", "<|im_end|>")
    assert run(["Hello <", "|im", "_end|> x"], ["<|im_end|>"], True)[:2] == ("Hello <|im_end|>", "<|im_end|>")
    assert run(["a < b", " c"], ["<|"])[2] == ["a < b", " c", ""]
    assert run(["x。", "y"], ["。"])[:2] == ("x", "。")
    assert run(["abab"], ["bab", "ab"])[:2] == ("", "ab")
    assert run(["xab"], ["ab", "xab"])[:2] == ("", "xab")
    assert run(["text"], [])[2] == ["text", ""]


def test_unchecked_text_neither_stops_nor_begins_a_stop() -> None:
    matcher = StopStringMatcher(["END"])
    assert matcher.push("xEND E", check=False).text == "xEND E"
    assert matcher.push("ND E").text == "ND "
    result = matcher.push("ND!")
    assert (result.text, result.stop) == ("", "END")


def test_held_text_is_shown_when_checking_ends() -> None:
    matcher = StopStringMatcher(["END"])
    assert matcher.push("aEN").text == "a"
    assert matcher.push("x", check=False).text == "ENx"
    assert matcher.final() == ""
