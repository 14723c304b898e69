"""Speculation changes how many steps an answer takes, and nothing of the answer."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from huoyan.api.outputs import RequestOutput
from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.answer import StopRules
from huoyan.engine.batch import build_batch
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.prompt_lookup import PLACES, PromptLookup, Speculator
from huoyan.engine.request import EngineRequest
from huoyan.engine.schedule import Chunk, Schedule
from huoyan.engine.sequence import Group, Sequence
from huoyan.engine.speculation import NgramSpeculation
from huoyan.errors import InputError, UnsupportedError
from huoyan.models.minicpmv import MiniCPMV
from huoyan.prompt.tokenizer import Tokenizer
from tests.engine.harness import drive, small_config
from tests.engine.support import picture, request, tiny_model, words
from tests.prompt.checkpoint import train, write_folder

EOS = 4


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    """In float64, so that what is added in another order comes out the same to the last bit of a logit."""
    return tiny_model(19).double()


class Oracle(Speculator):
    """Knows the answers, and spoils some of what it says."""

    def __init__(self, config: NgramSpeculation, answers: dict[str, list[int]], rng: random.Random) -> None:
        super().__init__(config)
        self.answers = answers
        self.rng = rng

    def propose(self, seq: Sequence, most: int) -> list[int]:
        assert seq.group.width == 1, "forks and beams are not guessed"
        assert seq.length + most < seq.group.max_length
        answer = self.answers[seq.group.request_id]
        said = len(seq.output_ids)
        assert seq.output_ids == answer[:said]
        draft = answer[said : said + self.rng.randint(0, min(most, self.config.num_speculative_tokens))]
        if draft and self.rng.random() < 0.5:
            draft[self.rng.randrange(len(draft))] = self.rng.randrange(5, 80)
        return draft


def random_params(rng: random.Random) -> SamplingParams:
    kind = rng.choice(["greedy", "greedy", "sampled", "sampled", "sampled", "several", "beams"])
    changes: dict[str, Any] = {
        "max_tokens": rng.choice([1, 2, 9, 25]),
        "min_tokens": rng.choice([0, 0, 1]),
        "stop_token_ids": rng.sample(range(89), rng.choice([0, 2, 6])),
        "logprobs": rng.choice([None, 0, 3]) if kind != "beams" else None,
        "repetition_penalty": rng.choice([1.0, 1.0, 1.2, 0.8]),
        "presence_penalty": rng.choice([0.0, 0.0, 1.0]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.5, -0.5]),
        "logit_bias": rng.choice([None, None, {7: 2.0, 8: -100.0}]),
        "ignore_eos": rng.random() < 0.5,
    }
    if kind == "beams":
        return SamplingParams(temperature=0, use_beam_search=True, best_of=2, n=1, **changes)
    if kind == "greedy":
        return SamplingParams(temperature=0, **changes)
    return SamplingParams(
        temperature=rng.choice([0.5, 1.5]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([-1, 20]),
        seed=rng.choice([None, 3]),
        n=2 if kind == "several" else 1,
        **changes,
    )


def assert_same(got: RequestOutput, want: RequestOutput) -> None:
    assert (got.error is None) == (want.error is None)
    assert len(got.outputs) == len(want.outputs)
    for a, b in zip(got.outputs, want.outputs, strict=True):
        assert a.token_ids == b.token_ids
        assert (a.text, a.finish_reason, a.stop_reason) == (b.text, b.finish_reason, b.stop_reason)
        assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-4)
        assert (a.logprobs is None) == (b.logprobs is None)
        for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
            assert [(t, e.rank) for t, e in x.items()] == [(t, e.rank) for t, e in y.items()]
            assert [e.logprob for e in x.values()] == pytest.approx([e.logprob for e in y.values()], abs=1e-4)


def speculating(config: EngineConfig, tokens: int, longest: int = 3, shortest: int = 1) -> EngineConfig:
    return EngineConfig(**{**vars(config), "speculation": NgramSpeculation(tokens, longest, shortest)})


def test_answers_are_those_of_one_token_a_step(model: MiniCPMV, seed: int) -> None:
    """Right, wrong and half right guesses under all parameters, in mixed batches and in pools that are too small."""
    rng = random.Random(seed)
    preemptions = accepted = wrong = hits = 0
    for i in range(10):
        tight = {"block_size": 2, "num_blocks": 30, "max_num_seqs": 6, "max_num_batched_tokens": 30}
        tight = {**tight, "enable_prefix_caching": True} if i % 2 == 0 else {}
        config = small_config(rng, **tight, kv_cache_dtype=rng.choice(["auto", "auto", "int8"]))
        opening = words(rng, 6)
        requests: list[EngineRequest] = []
        for j in range(rng.randint(4, 7)):
            parts: list[Any] = [*opening] if tight or rng.random() < 0.5 else []
            if rng.random() < 0.3:
                parts.append(picture(rng))
            parts += words(rng, rng.randint(1, 9))
            requests.append(request(f"r{j}", parts, random_params(rng)))
        if tight:
            # Two that surely outgrow the pool together.
            long = SamplingParams(temperature=0, max_tokens=45, ignore_eos=True)
            requests[:2] = [request(f"r{j}", words(rng, 5), long) for j in range(2)]
        plain = drive(Engine(model, config, eos_token_id=EOS), requests)
        engine = Engine(model, speculating(config, rng.choice([1, 2, 5, 9])), eos_token_id=EOS)
        answers = {name: output.outputs[0].token_ids for name, output in plain.items() if output.outputs}
        assert engine.config.speculation is not None
        engine._speculator = Oracle(engine.config.speculation, answers, rng)
        outputs = drive(engine, requests)
        for name, want in plain.items():
            assert_same(outputs[name], want)
        stats = engine.stats()
        preemptions += stats.preemptions
        accepted += stats.accepted_tokens
        wrong += stats.draft_tokens - stats.accepted_tokens
        hits += sum(o.metrics.cached_prompt_tokens for o in outputs.values() if o.metrics)
    assert preemptions
    assert accepted
    assert wrong
    assert hits


def test_repetitions_take_fewer_steps(model: MiniCPMV) -> None:
    """The real lookup: a model made to copy (a bias leaves it three tokens, greedily one) ends in long strides."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logit_bias={9: 100.0})
    one = request("r", [7, 8, 9, 9, 9], params)
    config = EngineConfig(num_blocks=40, block_size=4)
    plain, engine = Engine(model, config), Engine(model, speculating(config, 5))
    assert_same(drive(engine, [one])["r"], drive(plain, [one])["r"])
    assert plain.stats().steps == 60
    assert engine.stats().steps == 1 + 10, "60 tokens: one by the prompt's step, 59 by six at a time"
    assert engine.stats().accepted_tokens == 59 - 10


@pytest.mark.parametrize("run_ahead", [False, True])
def test_useless_drafts_are_given_up(
    model: MiniCPMV, monkeypatch: pytest.MonkeyPatch, run_ahead: bool
) -> None:
    """And between two of them the engine runs ahead again, where it may."""
    monkeypatch.setattr(PromptLookup, "find", lambda self, most: [88] * most)
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, logit_bias={88: -100.0})
    config = EngineConfig(num_blocks=80, block_size=4, run_ahead=run_ahead)
    engine = Engine(model, speculating(config, 8))
    one = request("r", [7, 8, 9], params)
    ahead = []
    launch = engine._launch
    monkeypatch.setattr(
        engine, "_launch", lambda before, out: (before and ahead.append(1)) or launch(before, out)
    )
    assert_same(drive(engine, [one])["r"], drive(Engine(model, config), [one])["r"])
    stats = engine.stats()
    assert stats.steps == 200
    # 8, 4 and 2 tokens, then one at a time, 8, 16, 32, 64 and 64 tokens apart.
    assert stats.draft_tokens == 8 + 4 + 2 + 5
    assert not stats.accepted_tokens
    assert bool(ahead) == run_ahead


def test_structured_answers_and_stop_strings(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, train()))
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    model = tiny_model(5, vocab_size=tokenizer.vocab_size + 3).double()
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 2, "stop": ["a", "the ", "."]},
        {"temperature": 1.0, "seed": 3, "stop": "e", "min_tokens": 12, "include_stop_str_in_output": True},
    ]
    requests = []
    for i, kind in enumerate(kinds * 2):
        params = SamplingParams(max_tokens=40, **kind)
        requests.append(request(f"r{i}", [rng.randrange(200) for _ in range(5)], params))
    try:
        import llguidance  # noqa: F401
    except ImportError:
        pass
    else:
        form = {"regex": "(red|blue|green) [a-c]{1,9}(, [a-c]{1,3}){0,2}"}
        for i, kind in enumerate(kinds[:2]):
            params = SamplingParams(max_tokens=40, structured_outputs=form, **kind)
            requests.append(request(f"s{i}", [7, 8], params))
    config = EngineConfig(num_blocks=200, block_size=8)
    parts = {"eos_token_id": end, "tokenizer": tokenizer}
    plain = drive(Engine(model, config, **parts), requests)  # type: ignore[arg-type]
    engine = Engine(model, speculating(config, 6), **parts)  # type: ignore[arg-type]
    assert engine.config.speculation is not None
    answers = {name: output.outputs[0].token_ids for name, output in plain.items()}
    engine._speculator = Oracle(engine.config.speculation, answers, rng)
    outputs = drive(engine, requests)
    for name, want in plain.items():
        assert want.error is None
        assert_same(outputs[name], want)
    assert engine.stats().accepted_tokens
    assert any(isinstance(o.outputs[0].stop_reason, str) for o in outputs.values())


def plain_lookup(ids: list[int], longest: int, shortest: int, most: int) -> list[int]:
    """Every place is compared."""
    best, best_agree = 0, 0
    for place in range(len(ids) - 1, 0, -1):
        agree = 0
        while agree < min(longest, place) and ids[place - 1 - agree] == ids[-1 - agree]:
            agree += 1
        if agree >= shortest and agree > best_agree:
            best, best_agree = place, agree
    if not best_agree:
        return []
    out = ids.copy()
    for i in range(most):
        out.append(out[best + i])
    return out[len(ids) :]


def test_the_longest_agreeing_place_is_found(seed: int) -> None:
    rng = random.Random(seed)
    found = 0
    for _ in range(60):
        longest = rng.randint(1, 5)
        shortest = rng.randint(1, longest)
        letters = rng.randint(2, 9)
        # No more places than are compared.
        ids = [rng.randrange(letters) for _ in range(rng.randint(0, PLACES))]
        lookup = PromptLookup(longest, shortest, ids)
        for _ in range(4):
            most = rng.randint(1, 7)
            got = lookup.find(most)
            found += bool(got)
            assert got == plain_lookup(ids, longest, shortest, most)
            if len(ids) >= PLACES:
                break
            more = [rng.randrange(letters) for _ in range(rng.randint(1, 3))]
            ids.extend(more)
            lookup.extend(more)
            ids = ids[: len(lookup)]
    assert found


def test_what_ends_an_answer_is_not_guessed() -> None:
    speculator = Speculator(NgramSpeculation(5, 2, 1))
    group = Group(request("r", [1, 2, 3, 4, 1]), 0, 4, 1, 99)
    for rules, draft in [
        (StopRules(None, frozenset(), 0, False), [2, 3, 4, 1, 2]),
        (StopRules(3, frozenset(), 0, False), [2]),
        (StopRules(None, frozenset({4}), 0, False), [2, 3]),
        (StopRules(None, frozenset(), 0, False, frozenset({2})), []),
    ]:
        seq: Any = SimpleNamespace(group=group, output_ids=[], answer=SimpleNamespace(rules=rules))
        assert speculator.propose(seq, 9) == draft
        speculator.forget(group)


@pytest.mark.parametrize("draft_rows", [True, False])
def test_drafts_in_a_batch(seed: int, draft_rows: bool) -> None:
    """Ids, positions and slots of guesses, and the rows that are sampled, token by token."""
    rng = random.Random(seed)
    for _ in range(20):
        schedule = Schedule()
        want: list[tuple[int, int, int]] = []
        for i in range(rng.randint(1, 5)):
            n, drafts = rng.randint(1, 30), tuple(rng.randrange(100) for _ in range(rng.choice([0, 1, 4])))
            known = [1000 * i + p for p in range(n)]
            seq: Any = SimpleNamespace(
                block_table=[100 * i + b for b in range(-(-(n + len(drafts)) // 4))],
                output_ids=known[n - 1 :],
                num_known=n,
                group=SimpleNamespace(prompt_len=n - 1),
                token_ids=lambda a, b, known=known: np.array(known[a:b], np.int64),
            )
            decode = rng.random() < 0.7
            start = n - 1 if decode else rng.randrange(n)
            chunk = Chunk(seq, start, n + len(drafts) if decode else n, True, drafts if decode else ())
            (schedule.decodes if decode else schedule.prefills).append(chunk)
        for chunk in schedule.chunks:
            ids = [*chunk.sequence.token_ids(0, chunk.end - len(chunk.drafts)).tolist(), *chunk.drafts]
            for p in range(chunk.end - 1 - len(chunk.drafts), chunk.end):
                want.append((ids[p], p, chunk.sequence.block_table[p // 4] * 4 + p % 4))
        batch = build_batch(schedule, 4, draft_rows)
        rows = batch.sampled_rows
        got = zip(
            batch.token_ids[rows].tolist(),
            batch.positions[rows].tolist(),
            batch.slot_mapping[rows].tolist(),
            strict=True,
        )
        assert list(got) == want
        assert batch.sampling == schedule.chunks
        assert batch.num_tokens == schedule.num_tokens
        lengths = batch.seq_lens[: batch.num_decodes].tolist()
        assert lengths == sorted(lengths, reverse=True)
        if draft_rows:
            assert batch.num_decodes == sum(1 + len(c.drafts) for c in schedule.decodes)


def test_a_row_each_gives_the_same(model: MiniCPMV, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that kernels and graphs take, through the plain attention."""
    from huoyan.engine import runner

    rng = random.Random(seed)
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=30, ignore_eos=True)
    requests = [request(f"r{i}", words(rng, rng.randint(1, 40)), params) for i in range(4)]
    config = EngineConfig(num_blocks=60, block_size=4, max_num_seqs=20)
    plain = drive(Engine(model, config), requests)
    monkeypatch.setattr(runner, "build_batch", lambda s, size, draft_rows: build_batch(s, size, True))
    engine = Engine(model, speculating(config, 4))
    assert engine.config.speculation is not None
    answers = {name: output.outputs[0].token_ids for name, output in plain.items()}
    engine._speculator = Oracle(engine.config.speculation, answers, rng)
    for name, output in drive(engine, requests).items():
        assert_same(output, plain[name])
    assert engine.stats().accepted_tokens


def test_vllms_dictionary() -> None:
    parse = NgramSpeculation.parse
    assert parse(None) is None
    assert parse({"method": "ngram", "num_speculative_tokens": 3}) == NgramSpeculation(3, 5, 5)
    assert parse(
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    ) == NgramSpeculation(3, 4, 2)
    assert parse(
        {"model": "[ngram]", "num_speculative_tokens": 1, "prompt_lookup_min": 2}
    ) == NgramSpeculation(1, 2, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "eagle", "num_speculative_tokens": 3}, "prompt lookup only"),
        ({"num_speculative_tokens": 3}, "prompt lookup only"),
        ({"method": "ngram"}, "num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "at least 1"),
        ({"method": "ngram", "num_speculative_tokens": 2.0}, "whole number"),
        (
            {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2, "prompt_lookup_min": 3},
            "above",
        ),
        ({"method": "ngram", "num_speculative_tokens": 2, "draft_tensor_parallel_size": 2}, "draft_tensor"),
        ("ngram", "dictionary"),
    ],
)
def test_mistakes_are_named(given: Any, message: str) -> None:
    with pytest.raises((InputError, UnsupportedError), match=message) as caught:
        NgramSpeculation.parse(given)
    assert "\n" not in str(caught.value)
