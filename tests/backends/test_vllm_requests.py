"""The vLLM backend's own work, over a table instead of vLLM: searches, samples, ends, failures.

A search is compared with the native engine's policy driven in lockstep from the same logits; the runs behind it
come back in random order and in bursts, which must not show.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from huoyan.api.outputs import RequestOutput
from huoyan.api.sampling_params import SamplingParams
from huoyan.backends.vllm import params as vllm_params_module
from huoyan.backends.vllm.backend import Limits, VllmBackend
from huoyan.engine.answer import Answer, StopRules
from huoyan.engine.beam import BeamSearch
from huoyan.engine.request import EngineRequest
from huoyan.engine.sampler import SamplingRow, beam_candidates
from huoyan.engine.token_counts import TokenCounts
from huoyan.errors import InputError
from huoyan.prompt.types import EncodedPrompt
from tests.backends.fake_vllm import FakeClient, Table

EOS, END = 0, 1
CONTEXT = 24


@pytest.fixture(autouse=True)
def plain_params(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_params_module, "vllm_params", lambda **fields: SimpleNamespace(**fields))


def backend(client: FakeClient) -> VllmBackend:
    limits = Limits(client.table.vocab, 64, CONTEXT, 8)
    return VllmBackend(
        client,  # type: ignore[arg-type]
        limits,
        eos_token_id=EOS,
        stop_token_ids=(EOS, END),
        tokenizer=None,
    )


def request(name: str, prompt: list[int], params: SamplingParams) -> EngineRequest:
    return EngineRequest(name, EncodedPrompt(prompt), params)


def run(engine: VllmBackend) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.request_id not in last or not last[output.request_id].finished
            last[output.request_id] = output
    return last


def lockstep(table: Table, prompt: list[int], params: SamplingParams) -> list[Answer]:
    """What the native engine makes of it: all beams step by step, from whole rows of logits."""
    rules = StopRules.of(params, EOS, (EOS, END))
    room = CONTEXT - len(prompt)
    most = room if params.max_tokens is None else min(room, params.max_tokens)
    search = BeamSearch(params, len(prompt), max(len(prompt) + (params.max_tokens or 0), CONTEXT), EOS)
    live = [Answer(rules, None, most)]
    while live:
        rows = []
        for answer in live:
            counts = None
            if params.has_penalties:
                counts = TokenCounts(prompt)
                counts.update(answer.token_ids)
            rows.append(SamplingRow(params, len(answer.token_ids), rules.held_back, counts))
        logits = torch.tensor([table.logits((*prompt, *answer.token_ids)) for answer in live])
        live = [survivor.answer for survivor in search.advance(live, beam_candidates(logits, rows))]
    return search.best([])


def search_params(rng: random.Random) -> SamplingParams:
    width = rng.randint(2, 4)
    fields: dict[str, Any] = {
        "n": rng.randint(1, width),
        "best_of": width,
        "max_tokens": rng.choice([None, 1, 2, 5, 9]),
        "length_penalty": rng.choice([1.0, 1.0, 0.0, 0.5, 2.0, -1.0]),
        "early_stopping": rng.choice([False, False, True, "never"]),
        "ignore_eos": rng.random() < 0.3,
        "stop_token_ids": rng.choice([None, [2]]),
        "logprobs": rng.choice([None, 0, 2, 7]),
    }
    if rng.random() < 0.5:
        fields["logit_bias"] = rng.choice([None, {3: 1.5, EOS: -2.0}])
        fields["presence_penalty"] = rng.choice([0.0, 0.7])
        fields["frequency_penalty"] = rng.choice([0.0, -0.4])
        fields["min_tokens"] = rng.choice([0, 1, 3]) if fields["max_tokens"] in (None, 5, 9) else 0
    return SamplingParams(use_beam_search=True, temperature=0.0, **fields)


def test_searches_are_those_of_the_native_policy(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        table = Table(rng.randrange(2**31), rng.randint(8, 14), rng.choice([0.4, 1.0, 3.0]))
        client = FakeClient(table, rng.randrange(2**31))
        engine = backend(client)
        asked = {}
        for name in "abc"[: rng.randint(1, 3)]:
            prompt = [rng.randrange(table.vocab) for _ in range(rng.randint(1, 12))]
            asked[name] = (prompt, search_params(rng))
            engine.add_request(request(name, *asked[name]))
        for name, output in run(engine).items():
            wanted = lockstep(table, *asked[name])
            assert output.error is None
            assert output.finished
            assert [answer.token_ids for answer in output.outputs] == [w.token_ids for w in wanted]
            for answer, reference in zip(output.outputs, wanted, strict=True):
                assert answer.cumulative_logprob == pytest.approx(reference.cumulative_logprob, abs=1e-4)
                assert (answer.finish_reason, answer.stop_reason) == (
                    reference.finish_reason,
                    reference.stop_reason,
                )
                assert (answer.logprobs is None) == (asked[name][1].logprobs is None)
                for mine, theirs in zip(answer.logprobs or [], reference.logprobs, strict=False):
                    assert list(mine) == list(theirs)
                    assert [e.logprob for e in mine.values()] == pytest.approx(
                        [e.logprob for e in theirs.values()], abs=1e-4
                    )
                    assert [e.rank for e in mine.values()] == [e.rank for e in theirs.values()]
        assert not client.runs, "runs are left behind"


def test_a_run_serves_its_beam_while_it_can() -> None:
    """A model that is sure of itself: one beam leads, its run is never started again."""
    table = Table(5, 12, 0.05)
    client = FakeClient(table, 1)
    engine = backend(client)
    params = SamplingParams(
        use_beam_search=True, temperature=0.0, best_of=2, max_tokens=12, ignore_eos=True, length_penalty=0.0
    )
    engine.add_request(request("a", [4, 5], params))
    run(engine)
    assert client.started < 12, "as many runs as a step has beams would be 23"


def test_samples_are_answers_of_their_own(seed: int) -> None:
    rng = random.Random(seed)
    table = Table(seed, 10, 1.0)
    client = FakeClient(table, seed)
    engine = backend(client)
    prompt = [rng.randrange(10) for _ in range(4)]
    params = SamplingParams(n=2, best_of=3, temperature=1.0, seed=2**64 - 2, max_tokens=6)
    engine.add_request(request("a", prompt, params))
    assert [run.params.seed for run in client.runs.values()] == [2**64 - 2, 2**64 - 1, 0]
    output = run(engine)["a"]
    assert len(output.outputs) == 2
    assert all(answer.cumulative_logprob is not None for answer in output.outputs)
    assert all(answer.logprobs is None for answer in output.outputs)
    plain = SamplingParams(temperature=0.0, max_tokens=6)
    engine.add_request(request("b", prompt, plain))
    (answer,) = run(engine)["b"].outputs
    assert answer.token_ids == output.outputs[0].token_ids
    assert answer.cumulative_logprob is None, "vLLM was not asked for it"


def test_an_answer_ends_with_the_context() -> None:
    client = FakeClient(Table(1, 9, 1.0), 1)
    engine = backend(client)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    engine.add_request(request("a", [3] * (CONTEXT - 4), params))
    (answer,) = run(engine)["a"].outputs
    assert (len(answer.token_ids), answer.finish_reason) == (4, "length")


@pytest.mark.parametrize("search", [False, True])
def test_an_abort_leaves_nothing(search: bool) -> None:
    client = FakeClient(Table(2, 9, 1.0), 3)
    engine = backend(client)
    kind = {"use_beam_search": True, "best_of": 3} if search else {"n": 3, "temperature": 1.0}
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 15, "ignore_eos": True, **kind})
    engine.add_request(request("a", [3, 4], params))
    engine.add_request(request("b", [3, 4], SamplingParams(temperature=0.0, max_tokens=15, ignore_eos=True)))
    for _ in range(4):
        engine.step()
    engine.abort_request("a")
    engine.abort_request("a")
    engine.abort_request("never heard of")
    assert all(run_id.startswith("b/") for run_id in client.runs)
    outputs = run(engine)
    assert {answer.finish_reason for answer in outputs["a"].outputs} == {"abort"}
    assert outputs["a"].finished
    assert len(outputs["b"].outputs[0].token_ids) == 15


def test_one_request_fails_beside_others() -> None:
    client = FakeClient(Table(2, 9, 1.0), 3)
    engine = backend(client)
    params = SamplingParams(temperature=1.0, n=2, max_tokens=10, ignore_eos=True)
    engine.add_request(request("a", [3], params))
    engine.add_request(request("b", [3], params))
    client.kill.add("a/1")
    outputs = run(engine)
    assert "could not go on" in (outputs["a"].error or "")
    assert (outputs["a"].outputs, outputs["a"].finished) == ([], True)
    assert outputs["b"].error is None
    assert not client.runs


@pytest.mark.parametrize(
    ("name", "prompt", "params", "message"),
    [
        ("a", [99], {}, "outside the vocabulary"),
        ("a", [], {}, "empty"),
        ("a", [3] * CONTEXT, {}, "the context is 24"),
        ("a", [3], {"n": 9, "temperature": 1.0}, "max_num_seqs is 8"),
        ("a", [3], {"temperature": 2.5}, "at most 2"),
        ("a", [3], {"logit_bias": {400: 1.0}}, "vocabulary ends at 8"),
        ("refuse", [3], {}, "vLLM refuses"),
        ("half", [3], {"n": 2, "temperature": 1.0}, "half of it"),
        ("a", [3], {"use_beam_search": True, "best_of": 2, "repetition_penalty": 1.1}, "engine='native'"),
    ],
)
def test_what_cannot_run_is_refused_alone(
    name: str, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    client = FakeClient(Table(2, 9, 1.0), 3)
    engine = backend(client)
    with pytest.raises(InputError, match=message):
        engine.add_request(request(name, prompt, SamplingParams(**{"temperature": 0.0, **params})))
    assert not client.runs
    assert not engine.has_unfinished_requests()


def test_an_id_is_used_once_at_a_time() -> None:
    engine = backend(FakeClient(Table(2, 9, 1.0), 3))
    params = SamplingParams(temperature=0.0, max_tokens=2)
    engine.add_request(request("a", [3], params))
    with pytest.raises(InputError, match="another id"):
        engine.add_request(request("a", [3], params))
    run(engine)
    engine.add_request(request("a", [3], params))
    assert run(engine)["a"].finished


def test_where_nobody_streams_only_last_outputs_are_made(seed: int) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    table = Table(seed, 10, 1.0)
    seen: dict[bool, list[RequestOutput]] = {}
    for streamed in (True, False):
        engine = backend(FakeClient(table, seed))
        asked = [request(name, [3, 4], params) for name in "ab"]
        for one in asked:
            one.streamed = streamed
            engine.add_request(one)
        seen[streamed] = []
        while engine.has_unfinished_requests():
            seen[streamed] += engine.step()
    assert len(seen[True]) > 2
    assert [output.finished for output in seen[False]] == [True, True]
    last = {o.request_id: o.outputs for o in seen[True] if o.finished}
    assert {o.request_id: o.outputs for o in seen[False]} == last


@pytest.mark.parametrize(
    ("streamed", "stop", "interval"), [(True, None, 1), (False, None, 16), (False, ["."], 1), (False, [], 16)]
)
def test_tokens_are_reported_together_where_nobody_waits_for_each(
    seed: int, streamed: bool, stop: list[str] | None, interval: int
) -> None:
    client = FakeClient(Table(seed, 10, 1.0), seed)
    one = request("a", [3, 4], SamplingParams(max_tokens=6, n=2, stop=stop))
    one.streamed = streamed
    backend(client).add_request(one)
    assert [run.params.stream_interval for run in client.runs.values()] == [interval] * 2
