"""What only a card shows: that the engine stays inside what it was told, and how far the plan is from it."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.planning.driver import context_bytes
from huoyan.planning.sizes import GIB
from tests.plan.shapes import Makes, random_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("eager", [True, False])
def test_a_card_is_not_taken_beyond_what_was_told(seed: int, eager: bool) -> None:
    rng = random.Random(seed)
    torch.cuda.empty_cache()
    model = random_model(rng, torch.bfloat16).to("cuda")
    told = 3 * GIB
    options = EngineConfig(gpu_memory=told, max_num_seqs=16, max_slice_patches=400, enforce_eager=eager)
    engine = Engine(model, options)
    torch.cuda.reset_peak_memory_stats()
    makes = Makes(rng, model.config, options)
    requests = [
        *makes.full_of_pictures(),
        *makes.beams()[:1],
        *makes.many()[:6],
        *makes.prompt_logprobs()[:1],
    ]
    for request in requests:
        engine.add_request(request)

    def run() -> list[str]:
        errors = []
        while engine.has_unfinished_requests():
            errors += [output.error for output in engine.step() if output.error is not None]
        return errors

    # A server's engine runs in another thread than the one that made it, and cuBLAS keeps workspaces for each.
    with ThreadPoolExecutor(1) as another:
        assert not another.submit(run).result()
    assert torch.cuda.max_memory_reserved() <= engine.size.torch_bytes  # type: ignore[operator]
    assert torch.cuda.max_memory_reserved() + context_bytes() <= told
    engine.close()
