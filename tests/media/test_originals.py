"""Pictures that wait as they are: the same keys and slices, and no more memory than said."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from huoyan.media.originals import Originals
from huoyan.media.picture import Picture
from huoyan.media.prepare import prepare_items, prepare_picture
from huoyan.media.slicing import plan_slices
from huoyan.media.types import MediaItem, SliceRules

RULES = SliceRules(scale_resolution=56)


def picture(rng: np.random.Generator, width: int, height: int) -> Picture:
    return Picture(rng.integers(0, 256, (height, width, 3), np.uint8))


def test_an_original_has_the_key_and_the_slices_of_a_cut_picture(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        whole = picture(rng, int(rng.integers(1, 300)), int(rng.integers(1, 300)))
        limit = int(rng.integers(1, 10))
        cut, kept = prepare_picture(whole, RULES, limit), prepare_picture(whole, RULES, limit, Originals())
        assert cut.original is None
        assert kept.original is whole.pixels
        assert (kept.key, kept.plan, kept.num_slices) == (cut.key, cut.plan, cut.num_slices)
        assert kept.plan.num_pixels == sum(s.shape[0] * s.shape[1] for s in cut.slices)
        for a, b in zip(kept.slices, cut.slices, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_excess_of_all_that_wait_is_bounded(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = [picture(rng, 200, 100) for _ in range(5)]
    excess = 3 * (200 * 100 - plan_slices((200, 100), RULES, 1).num_pixels)
    assert excess > 0
    originals = Originals(excess=2 * excess + 10)

    def kept(p: Picture) -> bool:
        prepared = prepare_picture(p, RULES, 1, originals)
        waiting.append(prepared)
        return prepared.original is not None

    waiting: list[object] = []
    assert [kept(p) for p in whole] == [True, True, False, False, False]
    small = picture(rng, 20, 20)
    assert kept(small), "one that is smaller than its slices costs nothing"
    del waiting[0]
    gc.collect()
    assert [kept(p) for p in whole] == [True, False, False, False, False]
    waiting.clear()
    gc.collect()
    assert [kept(p) for p in whole[:3]] == [True, True, False]


def test_a_very_large_one_is_cut_on_the_host(seed: int) -> None:
    rng = np.random.default_rng(seed)
    originals = Originals(largest=3 * 100 * 100)
    assert prepare_picture(picture(rng, 100, 100), RULES, None, originals).original is not None
    assert prepare_picture(picture(rng, 101, 100), RULES, None, originals).original is None


@pytest.mark.parametrize("threads", [1, 4])
def test_items_are_kept_from_several_threads(seed: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    items = [MediaItem(tuple(picture(rng, 120, 80) for _ in range(4)), max_slice_nums=1) for _ in range(5)]
    excess = 3 * (120 * 80 - plan_slices((120, 80), RULES, 1).num_pixels)
    originals = Originals(excess=7 * excess)
    with ThreadPoolExecutor(threads) as pool:
        kept = pool.map(lambda item: prepare_items([item], RULES, originals), items)
        prepared = [picture for pictures in kept for picture in pictures]
    assert [p.key for p in prepared] == [p.key for p in prepare_items(items, RULES)]
    assert sum(p.original is not None for p in prepared) == 7
