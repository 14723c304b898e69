from __future__ import annotations

import random

import pytest

from huoyan.engine.block_pool import BlockPool, OutOfBlocks


def test_allocates_every_block_once_then_says_so() -> None:
    pool = BlockPool(5, 4)
    assert sorted(pool.allocate() for _ in range(5)) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    with pytest.raises(OutOfBlocks):
        pool.allocate()


def test_freed_contents_are_found_until_evicted_oldest_first() -> None:
    pool = BlockPool(3, 4)
    table = [pool.allocate() for _ in range(3)]
    for block, name in zip(table, (b"a", b"b", b"c"), strict=True):
        pool.register(block, name)
    pool.release_table(table)
    assert pool.num_free == 3
    assert pool.match([b"a", b"b", b"c"]) == table
    # The end of the prefix was freed first, so it goes first.
    assert pool.allocate() == table[2]
    assert pool.match([b"a", b"b", b"c"]) == table[:2]
    pool.share(table[0])
    assert pool.allocate() == table[1]
    assert pool.match([b"a", b"b"]) == table[:1]
    pool.check([[table[0]], [table[1]], [table[2]]])


def test_match_stops_at_the_first_unknown_block() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.register(block, b"b")
    assert pool.match([b"a", b"b"]) == []


def test_known_contents_keep_their_first_block() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"x")
    pool.register(second, b"x")
    assert pool.match([b"x"]) == [first]
    pool.release(second)
    assert pool.allocate() == second, "a block whose contents are held elsewhere is blank"


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(2, 4, enable_prefix_caching=False)
    block = pool.allocate()
    pool.register(block, b"x")
    assert pool.match([b"x"]) == []


def test_misuse_is_caught() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(block)
    with pytest.raises(RuntimeError, match="no known contents"):
        pool.share(block)
    with pytest.raises(RuntimeError, match="is free"):
        pool.register(block, b"x")


def test_check_notices_a_leak_and_a_double_owner() -> None:
    pool = BlockPool(3, 4)
    block = pool.allocate()
    with pytest.raises(AssertionError):
        pool.check([])
    with pytest.raises(AssertionError):
        pool.check([[block], [block]])
    pool.check([[block]])


def test_reset_forgets_held_and_free_contents() -> None:
    pool = BlockPool(3, 4)
    held, freed = pool.allocate(), pool.allocate()
    pool.register(held, b"h")
    pool.register(freed, b"f")
    pool.release(freed)
    pool.reset_prefix_cache()
    assert pool.num_cached == 0
    pool.check([[held]])
    pool.release(held)
    pool.check([])


def test_random_life_keeps_the_books(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        pool = BlockPool(rng.randint(1, 12), 4, rng.random() < 0.8)
        tables: list[list[int]] = []
        names = [bytes([i]) for i in range(20)]
        for _ in range(200):
            move = rng.random()
            if move < 0.45 and pool.num_free:
                table = rng.choice(tables) if tables and rng.random() < 0.6 else []
                if not table:
                    tables.append(table)
                table.append(pool.allocate())
            elif move < 0.6 and tables:
                fork = rng.choice(tables)[:]
                for block in fork:
                    pool.share(block)
                tables.append(fork)
            elif move < 0.75 and tables:
                pool.release_table(tables.pop(rng.randrange(len(tables))))
            elif move < 0.9 and tables and (table := rng.choice(tables)):
                pool.register(rng.choice(table), rng.choice(names))
            else:
                found = pool.match([rng.choice(names)])
                for block in found:
                    pool.share(block)
                if found:
                    tables.append(found)
            pool.check(tables)
        for table in tables:
            pool.release_table(table)
        pool.check([])
        assert pool.num_free == pool.num_blocks
