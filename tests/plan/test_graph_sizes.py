"""Which steps have graphs."""

from __future__ import annotations

import random

from huoyan.planning.graphs import step_graph_sizes


def test_whole_tiles_are_some_of_what_the_plan_counts(seed: int) -> None:
    rng = random.Random(seed)
    for most in (64, 300, 700, 2048, rng.randrange(1, 5000)):
        prompts, steps = step_graph_sizes(most, 64)
        whole, same = step_graph_sizes(most, 64, whole_tiles=True)
        assert same == steps
        assert all(size.tokens <= 256 or size.tokens % 128 == 0 for size in whole)
        # One that has room for as much may be the next larger one, which steps beside decodes have anyway.
        assert whole[-1].tokens >= min(most, 768)
        assert max(size.tokens for size in whole) <= max(size.tokens for size in (*prompts, *steps))
        assert len(whole) <= len(prompts)
