"""Text and ends of one answer, over a tokenizer whose tokens are single bytes."""

from __future__ import annotations

import random

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.answer import Answer, AnswerText, ChosenToken, StopRules
from huoyan.prompt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|pad|>", special=True)])
    return Tokenizer(inner, {"eos_token": "<|end|>"})


def run(tokenizer: Tokenizer, ids: list[int], max_tokens: int = 10**6, **params: object) -> Answer:
    """An answer that is given the ids until it ends."""
    params.setdefault("max_tokens", None)
    settings = SamplingParams(**params)  # type: ignore[arg-type]
    eos = tokenizer.token_to_id("<|end|>")
    rules = StopRules.of(settings, eos, (eos or 0, tokenizer.token_to_id("<|pad|>") or 0))
    answer = Answer(rules, AnswerText.of(settings, tokenizer), max_tokens)
    for token_id in ids:
        if answer.append(ChosenToken(token_id, -0.5)):
            break
    return answer


def test_eos_is_kept_as_a_token_and_left_out_of_the_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_plain("天空 is blue"), *tokenizer.encode_with_specials("<|end|>")]
    answer = run(tokenizer, [*ids, 1, 2, 3], skip_special_tokens=False)
    assert answer.text == "天空 is blue"
    assert answer.token_ids == ids
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    assert answer.cumulative_logprob == pytest.approx(-0.5 * len(ids))
    shown = run(tokenizer, ids, skip_special_tokens=False, include_stop_str_in_output=True)
    assert shown.text == "天空 is blue<|end|>"


def test_other_stop_tokens_are_named(tokenizer: Tokenizer) -> None:
    pad = tokenizer.token_to_id("<|pad|>")
    assert run(tokenizer, [*tokenizer.encode_plain("ab"), pad or 0]).stop_reason == pad
    b = tokenizer.encode_plain("b")[0]
    answer = run(tokenizer, tokenizer.encode_plain("aabcc"), stop_token_ids=[b])
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("aa", "stop", b)


def test_ignore_eos_goes_on(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_with_specials("a<|end|>b<|pad|>c")
    answer = run(tokenizer, ids, ignore_eos=True)
    assert answer.text == "abc"
    assert answer.finish_reason is None


def test_stop_strings_end_it_and_are_cut(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("一二三 END 四")
    answer = run(tokenizer, ids, stop=["END", "五"])
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("一二三 ", "stop", "END")
    assert answer.token_ids == tokenizer.encode_plain("一二三 END")
    assert run(tokenizer, ids, stop="END", include_stop_str_in_output=True).text == "一二三 END"


def test_text_that_might_become_a_stop_string_comes_with_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("go EN")
    assert run(tokenizer, ids, stop=["END"]).text == "go "
    assert run(tokenizer, ids, stop=["END"], max_tokens=len(ids)).text == "go EN"
    ended = run(tokenizer, [*ids, *tokenizer.encode_with_specials("<|end|>")], stop=["END"])
    assert (ended.text, ended.stop_reason) == ("go EN", None)


def test_half_a_character_is_shown_only_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("好天")[:-1]
    assert run(tokenizer, ids).text == "好"
    assert run(tokenizer, ids, max_tokens=len(ids)).text == "好\ufffd"


def test_length_counts_tokens_and_a_stop_string_wins(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("abcdef")
    answer = run(tokenizer, ids, max_tokens=3)
    assert (answer.text, answer.finish_reason) == ("abc", "length")
    answer = run(tokenizer, ids, max_tokens=3, stop=["bc"])
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("a", "stop", "bc")


def test_nothing_stops_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("xaxaxa")
    assert run(tokenizer, ids, stop=["a"], min_tokens=4).token_ids == ids[:4]
    assert run(tokenizer, ids, stop_token_ids=[ids[1]], min_tokens=3).token_ids == ids[:4]


def test_forks_part(tokenizer: Tokenizer, seed: int) -> None:
    """Wherever an answer forks, both go on as if they had been alone from the start."""
    rng = random.Random(seed)
    for _ in range(200):
        text = "".join(rng.choice("ab天好 🙂") for _ in range(rng.randint(1, 12)))
        other = "".join(rng.choice("ab天好 🙂") for _ in range(rng.randint(1, 6)))
        ids, tail = tokenizer.encode_plain(text), tokenizer.encode_plain(other)
        cut = rng.randrange(len(ids) + 1)
        stop = rng.choice(["ab", "天好", "好a🙂", " "])
        trunk = run(tokenizer, ids[:cut], stop=stop)
        if trunk.finish_reason:
            continue
        twin = trunk.fork()
        for answer, rest in ((twin, tail), (trunk, ids[cut:])):
            for token_id in rest:
                if answer.append(ChosenToken(token_id, -0.5)):
                    break
            whole = run(tokenizer, ids[:cut] + rest, stop=stop)
            assert answer.text == whole.text
            assert answer.token_ids == whole.token_ids
            assert answer.stop_reason == whole.stop_reason
            assert answer.cumulative_logprob == pytest.approx(whole.cumulative_logprob)
