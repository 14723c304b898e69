"""Beams in the block pool: whatever branches, each beam reads its own past."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.request import EngineRequest
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.harness import drive, small_config
from tests.engine.support import greedy, picture, plain_logits, request, tiny_model, words


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return tiny_model(5)


def best(totals: Tensor, width: int) -> tuple[list[int], list[int], list[float], float]:
    """Parents, tokens and totals of the best continuations, and the smallest distance among them."""
    found = totals.flatten().topk(width + 1)
    vocab = totals.shape[1]
    margin = float((found.values[:-1] - found.values[1:]).min())
    indices = found.indices[:width].tolist()
    return [i // vocab for i in indices], [i % vocab for i in indices], found.values.tolist()[:-1], margin


def plain_beams(model: MiniCPMV, req: EngineRequest, width: int, steps: int) -> tuple[list[list[int]], float]:
    """The beams that live after `steps`, every one computed from its whole past, and how clear the choice was."""
    beams: list[list[int]] = [[]]
    scores = [0.0]
    smallest = 1e9
    for _ in range(steps):
        logits = torch.stack([plain_logits(model, req, beam)[-1] for beam in beams])
        totals = logits.log_softmax(-1).double() + torch.tensor(scores, dtype=torch.double)[:, None]
        parents, tokens, scores, margin = best(totals, width)
        beams = [[*beams[p], t] for p, t in zip(parents, tokens, strict=True)]
        smallest = min(smallest, margin)
    return beams, smallest


def test_beams_branch_by_block_table(model: MiniCPMV, seed: int) -> None:
    """Beam searches and plain requests together, in pools too small for all of them."""
    rng = random.Random(seed)
    preemptions = copies = compared = 0
    for _ in range(12):
        seqs = rng.randint(4, 8)
        block_size = rng.choice([1, 2, 4])
        config = small_config(
            rng,
            block_size=block_size,
            num_blocks=rng.randint(40, 70) // block_size,
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + 5,
        )
        engine = Engine(model, config)
        pic = picture(rng, 2)
        requests = []
        for i in range(rng.randint(3, 6)):
            prompt = [*words(rng, rng.randint(1, 12)), *([pic] if rng.random() < 0.3 else [])]
            width = rng.randint(2, 4)
            beams = {"use_beam_search": True, "best_of": width, "n": width} if rng.random() < 0.7 else {}
            requests.append(request(f"r{i}", prompt, greedy(rng.randint(1, 14), **beams)))
        outputs = drive(engine, requests, rng)
        for req in requests:
            output = outputs[req.request_id]
            if output.error is not None or output.metrics is None:
                continue
            preemptions += output.metrics.preemptions
            if req.params.use_beam_search:
                want, margin = plain_beams(model, req, req.params.n, len(output.outputs[0].token_ids))
                if margin > 1e-4:
                    assert [answer.token_ids for answer in output.outputs] == want
                    compared += 1
        copies += engine.runner.copied_blocks
    assert compared
    assert copies
    assert preemptions


def test_a_beam_step_copies_at_most_one_block_a_beam(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(model, EngineConfig(num_blocks=100, block_size=8))
    engine.add_request(request("r", words(rng, 60), greedy(20, use_beam_search=True, best_of=4, n=4)))
    engine.step()
    while engine.has_unfinished_requests():
        before = engine.runner.copied_blocks
        engine.step()
        assert engine.runner.copied_blocks - before <= 3
        held = engine.stats().blocks_used
        assert held <= 7 + 4 * 4, "the prompt is shared, only the answers are apart"
