"""Tables of barred tokens that are kept from step to step are those that would be made anew."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch

from huoyan.engine.barred_tokens import BarredTokens

CPU = torch.device("cpu")


def sequence(rng: random.Random) -> Any:
    rules = SimpleNamespace(held_back=frozenset(rng.sample(range(50), rng.randint(0, 3))))
    params = SimpleNamespace(min_tokens=rng.choice([0, 3, 6]))
    group = SimpleNamespace(takes_likeliest_but=rng.random() < 0.8, params=params)
    return SimpleNamespace(answer=SimpleNamespace(rules=rules), group=group, num_outputs=1)


def test_what_is_kept_is_what_would_be_made(seed: int) -> None:
    rng = random.Random(seed)
    kept = BarredTokens()
    sequences = [sequence(rng) for _ in range(4)]
    for _ in range(60):
        change = rng.choice(["", "", "shuffled", "one leaves", "one comes", "a step"])
        if change == "shuffled":
            rng.shuffle(sequences)
        elif change == "one leaves" and len(sequences) > 1:
            sequences.pop(rng.randrange(len(sequences)))
        elif change == "one comes":
            sequences.append(sequence(rng))
        elif change == "a step":
            for seq in sequences:
                seq.num_outputs += 1
        found, expected = kept.of(sequences, CPU), BarredTokens().of(sequences, CPU)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert torch.equal(found, expected)
            for seq, row in zip(sequences, found.tolist(), strict=True):
                bars = seq.group.takes_likeliest_but and seq.num_outputs - 1 < seq.group.params.min_tokens
                assert {token for token in row if token >= 0} == (
                    seq.answer.rules.held_back if bars else set()
                )
            assert kept.of(list(sequences), CPU) is found
