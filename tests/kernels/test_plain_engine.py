"""An engine whose plain rows are chosen by our kernels, in the interpreter, answers as one without them."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton")

import torch

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine import chooser, plain_tokens
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.noise import mix
from tests.engine.harness import drive
from tests.engine.support import request, tiny_model, words

CONFIG = EngineConfig(num_blocks=60, block_size=4, max_num_seqs=6, max_num_batched_tokens=24, run_ahead=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter only: see tests/engine/test_gpu.py")
def test_answers_are_those_without(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    model = tiny_model(rng.randrange(99))
    requests = []
    for i in range(8):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_k=rng.choice([-1, 5]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.1]),
            seed=rng.choice([None, rng.randrange(99)]),
            max_tokens=rng.choice([2, 7]),
            min_tokens=rng.choice([0, 0, 2]),
            stop_token_ids=rng.sample(range(60), 30) if rng.random() < 0.5 else None,
            ignore_eos=True,
            logprobs=rng.choice([None, None, None, 2]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.2]),
        )
        requests.append(request(f"r{i}", words(rng, rng.randint(1, 12)), params))
    expected = drive(Engine(model, CONFIG), requests)
    calls = []
    choose = plain_tokens.PlainTokens.__init__

    def noted(self, logits, draws=None, index=None, barred=None):  # type: ignore[no-untyped-def]
        calls.append(draws is not None)
        choose(self, logits, draws, index, barred)

    monkeypatch.setattr(plain_tokens.PlainTokens, "__init__", noted)
    for module in (chooser, plain_tokens):
        monkeypatch.setattr(module, "chooses_by_kernel", lambda logits: True)
    got = drive(Engine(model, CONFIG), requests)
    for name, output in expected.items():
        answer, other = output.outputs[0], got[name].outputs[0]
        assert answer.token_ids == other.token_ids
        assert answer.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)
    assert calls


def test_keys_are_those_of_one_row(seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(tiny_model(3), CONFIG)
    for i, own in enumerate([None, rng.randrange(99)]):
        engine.add_request(request(f"r{i}", [5, 6], SamplingParams(seed=own, max_tokens=5)))
    from huoyan.engine.noise import mix_further

    sequences = [group.sequences[0] for group in engine._groups.values()]
    draws = engine._chooser._draws
    import numpy as np

    states = np.array([draws.key_state(seq) & (2**64 - 1) for seq in sequences], np.uint64)
    for step in (0, 1, rng.randrange(2**20)):
        keys = mix_further(states, np.full(2, step, np.uint64))
        assert keys.tolist() == [engine._chooser._key(seq.group, 0, step) for seq in sequences]
        assert int(keys[1]) == mix(mix(1, sequences[1].group.params.seed), 0, step)
