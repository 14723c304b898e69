"""Who owns which block of the KV cache: reference counts, the prefix cache, forks.

A block is a number in `[0, num_blocks)`. It is *held* (reference count above zero) or *free*; a full block
whose contents are known by hash stays findable after it is freed, until its place is needed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """No block is free. The scheduler looks before it allocates, so a user never sees this."""


class BlockPool:
    """Every operation takes constant time per block."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Blocks without known contents are taken first, the last freed one first: its memory is warm, and
        # on a CPU a pool that is mostly idle then never touches most of its pages.
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, cached ones included."""
        return len(self._blank) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks that `match` can find, held or free."""
        return len(self._block_of)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def allocate(self) -> int:
        """A block for one owner, contents unknown. Evicts the cached block that was freed longest ago.

        Raises:
            OutOfBlocks: every block is held.
        """
        if self._blank:
            block = self._blank.pop()
        elif self._evictable:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner of a held block, or the first owner of a free cached one."""
        if self._ref_counts[block] == 0:
            if self._hash_of[block] is None:
                raise RuntimeError(f"block {block} is free and has no known contents to share")
            del self._evictable[block]
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """One owner less. Freed blocks with known contents stay findable until evicted."""
        count = self._ref_counts[block] - 1
        if count < 0:
            raise RuntimeError(f"block {block} was released more often than it was taken")
        self._ref_counts[block] = count
        if count == 0:
            if self._hash_of[block] is None:
                self._blank.append(block)
            else:
                self._evictable[block] = None

    def release_table(self, block_table: Sequence[int]) -> None:
        """Release a sequence's blocks, last first: what is evicted first is then the end of a prefix."""
        for block in reversed(block_table):
            self.release(block)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of a chain of block hashes. Takes no reference."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a held, full block findable. Where the contents are known already, the older block stays."""
        if not self.enable_prefix_caching or self._hash_of[block] is not None:
            return
        if self._ref_counts[block] == 0:
            raise RuntimeError(f"block {block} is free: its contents may be overwritten")
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def is_free(self, block: int) -> bool:
        return self._ref_counts[block] == 0

    def reset_prefix_cache(self) -> None:
        """Forget all contents, e.g. after the weights changed."""
        for block in self._evictable:
            self._blank.append(block)
        self._evictable.clear()
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Hold the books against the block tables of all live sequences.

        Raises:
            AssertionError: a block leaked, is counted wrongly, or is free and held at once.
        """
        owners = Counter(block for table in block_tables for block in table)
        for block, count in enumerate(self._ref_counts):
            assert count == owners.get(block, 0), (
                f"block {block}: count {count}, owners {owners.get(block, 0)}"
            )
        free = [*self._blank, *self._evictable]
        assert len(free) == len(set(free)), "a block is in the free lists twice"
        assert set(free) == {b for b, c in enumerate(self._ref_counts) if c == 0}, (
            "free lists and counts disagree"
        )
        assert all(self._hash_of[b] is None for b in self._blank), "a blank block claims known contents"
        known = {h: b for b, h in enumerate(self._hash_of) if h is not None}
        assert known == self._block_of, "the prefix cache's two directions disagree"

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
