from __future__ import annotations

import random

import numpy as np

from huoyan.engine.block_hash import ROOT, BlockHasher, SliceRun, slice_runs
from tests.engine.support import picture, request


def chain(tokens: list[int], runs: tuple[SliceRun, ...] = (), block_size: int = 4) -> list[bytes]:
    hasher = BlockHasher(block_size, runs)
    digests: list[bytes] = []
    for i in range(len(tokens) // block_size):
        ids = np.array(tokens[i * block_size : (i + 1) * block_size], np.int64)
        digests.append(hasher.digest(digests[-1] if digests else ROOT, i, ids))
    return digests


def test_a_block_stands_for_all_that_is_before_it() -> None:
    one, two = chain([1, 2, 3, 4, 5, 6, 7, 8]), chain([1, 2, 3, 9, 5, 6, 7, 8])
    assert one != two
    assert one[1] != two[1]
    assert chain([1, 2, 3, 4, 9, 9, 9, 9])[0] == one[0]


def test_pictures_count_by_content_slice_and_place() -> None:
    tokens = [7, 3, 3, 3, 3, 3, 3, 7]
    base = (SliceRun(1, 4, 0, 0, b"a"), SliceRun(4, 7, 0, 1, b"a"))
    same = chain(tokens, base)
    assert chain(tokens, tuple(SliceRun(r.start, r.end, 5, r.slice_index, r.key) for r in base)) == same
    others = [
        (SliceRun(1, 4, 0, 0, b"b"), base[1]),
        (base[0], SliceRun(4, 7, 0, 0, b"a")),
        (SliceRun(1, 3, 0, 0, b"a"), SliceRun(3, 7, 0, 1, b"a")),
        (SliceRun(2, 4, 0, 0, b"a"), base[1]),
        (),
    ]
    seen = [chain(tokens, runs)[-1] for runs in others]
    assert len({same[-1], *seen}) == 1 + len(seen)
    assert chain(tokens, base[:1])[0] == same[0], "what comes later does not count"


def test_a_run_over_several_blocks_counts_in_each(seed: int) -> None:
    rng = random.Random(seed)
    one, two = request("r", [9, 9, picture(rng, 3)]), request("r", [9, 9, picture(rng, 3)])
    assert one.prompt.token_ids == two.prompt.token_ids
    a = chain(one.prompt.token_ids, slice_runs(one.pictures, one.prompt.slots), 2)
    b = chain(two.prompt.token_ids, slice_runs(two.pictures, two.prompt.slots), 2)
    assert a[0] == b[0]
    assert all(x != y for x, y in zip(a[1:], b[1:], strict=True))
