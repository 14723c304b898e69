"""Processes that draw, cut and tokenise, and hand whole records to the trainer through shared memory.

The memory is an anonymous mapping made before the fork: no file, no limit of /dev/shm, and it can be
registered with CUDA so that copies to the device do not pass through a staging buffer.
"""

from __future__ import annotations

import mmap
import multiprocessing as mp
import os
import queue
import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiny_trainer.pictures import CHANNELS
from tiny_trainer.records import Record

PIXELS = 588
SLOT_PATCHES = 12288
EXAMPLES_PER_SLOT = 24

Draw = Callable[[random.Random, str], Record]
"""(rng, family) -> one training record."""


@dataclass(frozen=True, eq=False)
class Delivery:
    """Some records, and the slot their patches lie in until `Workers.release(slot)`.

    The records' `patches` and `marks` are views into the slot.
    """

    records: list[Record]
    slot: int
    patches: NDArray[np.uint8]
    marks: NDArray[np.uint8]


class Workers:
    """`count` forked processes (start them before CUDA is touched); 0 draws in the calling process."""

    def __init__(self, count: int, draw: Draw, weights: Mapping[str, float], seed: int) -> None:
        self.count = count
        self.families = list(weights)
        self._draw = draw
        self._rng = random.Random(seed)
        context = mp.get_context("fork")
        self._weights = context.Array("d", [float(w) for w in weights.values()], lock=False)
        self.failures: list[str] = []
        self._processes: list[ForkProcess] = []
        # The process that launches kernels must not wait for a core: workers stay off the last ones.
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._cores = set(cores[:count]) if 0 < count <= len(cores) - 2 else set()
        self.slots = max(4, 4 * count)
        self._slot_bytes = SLOT_PATCHES * (PIXELS + CHANNELS)
        self.memory = mmap.mmap(-1, self.slots * self._slot_bytes)
        if count == 0:
            return
        self._free: Any = context.Queue()
        self._ready: Any = context.Queue()
        for slot in range(self.slots):
            self._free.put(slot)
        for index in range(count):
            process = context.Process(target=self._work, args=(seed + 7919 * (index + 1),), daemon=True)
            process.start()
            self._processes.append(process)

    @property
    def spare_cores(self) -> set[int]:
        """Cores that no worker runs on; empty where the workers are not kept apart."""
        return os.sched_getaffinity(0) - self._cores if self._cores else set()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """How often each family is drawn from now on."""
        for i, family in enumerate(self.families):
            self._weights[i] = float(weights[family])

    def buffer(self) -> NDArray[np.uint8]:
        """All slots, as bytes."""
        return np.frombuffer(self.memory, dtype=np.uint8)

    def _views(self, slot: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        whole = self.buffer()[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]
        cut = SLOT_PATCHES * PIXELS
        return whole[:cut].reshape(-1, PIXELS), whole[cut:].reshape(-1, CHANNELS)

    def _work(self, seed: int) -> None:
        os.nice(19)
        if self._cores:
            os.sched_setaffinity(0, self._cores)
        rng = random.Random(seed)
        np.random.seed(seed % 2**32)
        parent = os.getppid()
        spare: Record | None = None
        while os.getppid() == parent:
            try:
                slot = self._free.get(timeout=5)
            except queue.Empty:
                continue
            patches, marks = self._views(slot)
            rows: list[Record] = []
            used = 0
            try:
                while len(rows) < EXAMPLES_PER_SLOT:
                    record = spare or self._draw(rng, self._family(rng))
                    spare = None
                    size = len(record.patches)
                    if size > SLOT_PATCHES:
                        continue
                    if used + size > SLOT_PATCHES:
                        spare = record
                        break
                    patches[used : used + size] = record.patches
                    marks[used : used + size] = record.marks
                    used += size
                    rows.append(replace(record, patches=_EMPTY, marks=_EMPTY))
                self._ready.put((slot, rows, None))
            except Exception:
                self._free.put(slot)
                self._ready.put((-1, [], traceback.format_exc(limit=4)))

    def _family(self, rng: random.Random) -> str:
        return rng.choices(self.families, weights=list(self._weights))[0]

    def take(self, timeout: float) -> Delivery | None:
        """The next records, None if there are none within `timeout` seconds."""
        if self.count == 0:
            return self._draw_here()
        deadline = time.monotonic() + timeout
        while True:
            try:
                left = deadline - time.monotonic()
                slot, rows, failure = (
                    self._ready.get(timeout=max(left, 0)) if left > 0 else self._ready.get_nowait()
                )
            except queue.Empty:
                return None
            if failure is None:
                return self._deliver(slot, rows)
            self.failures.append(failure)

    def _deliver(self, slot: int, rows: Sequence[Record]) -> Delivery:
        patches, marks = self._views(slot)
        records = []
        at = 0
        for row in rows:
            size = sum(r * c for r, c in row.grids)
            records.append(replace(row, patches=patches[at : at + size], marks=marks[at : at + size]))
            at += size
        return Delivery(records, slot, patches[:at], marks[:at])

    def _draw_here(self) -> Delivery:
        records = [self._draw(self._rng, self._family(self._rng)) for _ in range(8)]
        return Delivery(
            records,
            -1,
            np.concatenate([r.patches for r in records]),
            np.concatenate([r.marks for r in records]),
        )

    def release(self, slot: int) -> None:
        """The slot's records are copied elsewhere: a worker may fill it again."""
        if slot >= 0:
            self._free.put(slot)

    def alive(self) -> int:
        return sum(p.is_alive() for p in self._processes)

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(timeout=5)


_EMPTY = np.zeros((0, 0), dtype=np.uint8)


def parallel_map(function: Callable[[Any], Any], items: Sequence[Any], processes: int) -> list[Any]:
    """`[function(x) for x in items]` over forked processes; results come back pickled."""
    if processes <= 1:
        return [function(x) for x in items]
    with mp.get_context("fork").Pool(processes) as pool:
        return pool.map(function, items, chunksize=max(1, len(items) // (processes * 8)))
