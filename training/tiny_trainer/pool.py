"""Drawn examples kept on the device, so that a fast device is never short of pictures.

Drawing is the slow part: each example is used as soon as it arrives and again later, mixed with new ones.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from tiny_trainer.records import Record
from tiny_trainer.workers import Delivery, Workers

MOST_TOKENS = 1024
"""Of an example; a longer one (one in a thousand or so) is left out."""


@dataclass(eq=False)
class Kept:
    """A record whose patches lie in `[start : start + count]` of the pool's rows, until it is `gone`."""

    record: Record
    start: int
    count: int
    uses: int = 0
    gone: bool = False


class Family:
    """Examples of one family, oldest first."""

    def __init__(self) -> None:
        self.items: list[Kept] = []
        self.gone = 0
        self.fresh: deque[Kept] = deque()

    def __len__(self) -> int:
        return len(self.items) - self.gone

    def forget_oldest(self) -> None:
        self.gone += 1
        if self.gone > 10000:
            del self.items[: self.gone]
            self.gone = 0


class Pool:
    """`rows` patches on `device`; the oldest examples make room for new ones."""

    def __init__(self, rows: int, pixels: int, channels: int, device: torch.device, seed: int) -> None:
        self.patches = torch.empty(rows, pixels, dtype=torch.uint8, device=device)
        self.marks = torch.empty(rows, channels, dtype=torch.uint8, device=device)
        self.rows = rows
        self.device = device
        self.order: deque[Kept] = deque()
        self.families: dict[str, Family] = {}
        self.head = 0
        self.received = 0
        self.rng = random.Random(seed)
        self._pending: deque[tuple[torch.cuda.Event, int]] = deque()

    def add(self, delivery: Delivery, workers: Workers) -> None:
        """Copy the records in; the slot is released once the copy is done."""
        total = len(delivery.patches)
        if self.head + total > self.rows:
            self._make_room(self.head, self.rows + 1)
            self.head = 0
        self._make_room(self.head, self.head + total)
        target = slice(self.head, self.head + total)
        self.patches[target].copy_(torch.from_numpy(delivery.patches), non_blocking=True)
        self.marks[target].copy_(torch.from_numpy(delivery.marks), non_blocking=True)
        at = self.head
        for record in delivery.records:
            count = len(record.patches)
            if len(record.ids) > MOST_TOKENS:
                at += count
                continue
            kept = Kept(replace(record, patches=_EMPTY, marks=_EMPTY), at, count)
            at += count
            self.order.append(kept)
            family = self.families.setdefault(record.family, Family())
            family.items.append(kept)
            family.fresh.append(kept)
        self.head = at
        self.received += len(delivery.records)
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._pending.append((event, delivery.slot))
            self.release_copied(workers)
        else:
            workers.release(delivery.slot)

    def release_copied(self, workers: Workers) -> None:
        while self._pending and self._pending[0][0].query():
            workers.release(self._pending.popleft()[1])

    def _make_room(self, start: int, end: int) -> None:
        """Forget the oldest examples that begin in [start, end); those without patches too, or they would stop it."""
        while self.order and start <= self.order[0].start < end:
            old = self.order.popleft()
            old.gone = True
            family = self.families[old.record.family]
            family.forget_oldest()
            if family.fresh and family.fresh[0] is old:
                family.fresh.popleft()

    def pick(self, weights: Mapping[str, float]) -> Kept:
        """One example: its family by weight, one that is not used yet before all others."""
        names = [name for name, family in self.families.items() if len(family) and weights.get(name, 0) > 0]
        family = self.families[self.rng.choices(names, [weights[name] for name in names])[0]]
        if family.fresh:
            kept = family.fresh.popleft()
        else:
            kept = family.items[self.rng.randrange(family.gone, len(family.items))]
        kept.uses += 1
        return kept


_EMPTY = np.zeros((0, 0), dtype=np.uint8)
