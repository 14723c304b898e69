"""From examples to what one training step needs on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from huoyan.models.patches import Grid
from tiny_trainer.attention import branch_bias
from tiny_trainer.records import Record

_ROUND = 16


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of similar length, padded to one length.

    `ids`, `positions` [rows * L]; `branch` [rows, L]; `slots` places of picture embeddings in the flat rows,
    taken in order from the embeddings `[first_embedding : first_embedding + len(slots)]`;
    `predict` flat places that are trained, their `targets` and `weights`, and which example they are of.
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    slots: Tensor
    first_embedding: int
    predict: Tensor
    targets: Tensor
    weights: Tensor
    example: Tensor

    @property
    def rows(self) -> int:
        return self.branch.shape[0]

    def to(self, device: torch.device) -> Group:
        values = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return Group(**values)

    def bias(self, dtype: torch.dtype) -> Tensor:
        return branch_bias(self.branch, dtype)


@dataclass(frozen=True, eq=False)
class TextBatch:
    """The token side of a step; `order` is how the examples (and so their slices) are arranged."""

    groups: list[Group]
    grids: list[Grid]
    order: list[int]

    def to(self, device: torch.device) -> TextBatch:
        return TextBatch([g.to(device) for g in self.groups], self.grids, self.order)


def make_groups(
    records: Sequence[Record], slot_id: int, *, max_groups: int = 3, queries: int = 64, pin: bool = False
) -> TextBatch:
    """Sort by length and cut into groups whose padding is small."""
    order = sorted(range(len(records)), key=lambda i: (len(records[i].ids), i))
    lengths = [len(records[i].ids) for i in order]
    groups = []
    first_embedding = 0
    for start, end in _cuts(lengths, max_groups):
        group = _group([records[i] for i in order[start:end]], start, slot_id, first_embedding)
        first_embedding += len(group.slots)
        groups.append(group)
    grids = [grid for i in order for grid in records[i].grids]
    if first_embedding != queries * len(grids):
        raise ValueError(f"{first_embedding} places for the embeddings of {len(grids)} slices")
    if pin:
        groups = [
            Group(**{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in vars(g).items()})
            for g in groups
        ]
    return TextBatch(groups, grids, order)


def _cuts(lengths: Sequence[int], max_groups: int) -> list[tuple[int, int]]:
    """Where to cut rising `lengths` into at most `max_groups` so that little is padded."""
    n = len(lengths)
    best = [(0, n)]
    while len(best) < max_groups:
        options = []
        for at, (start, end) in enumerate(best):
            for cut in range(start + 1, end, max(1, (end - start) // 32)):
                saved = (lengths[end - 1] - lengths[cut - 1]) * (cut - start)
                options.append((saved, at, cut))
        saved, at, cut = max(options, default=(0, 0, 0))
        # A group costs some kernel launches: it must save about that many tokens.
        if saved < 2048:
            break
        start, end = best[at]
        best[at : at + 1] = [(start, cut), (cut, end)]
    return best


def _group(records: Sequence[Record], first_example: int, slot_id: int, first_embedding: int) -> Group:
    length = -(-max(len(r.ids) for r in records) // _ROUND) * _ROUND
    shape = (len(records), length)
    ids = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    branch = np.full(shape, -1, dtype=np.int8)
    weights = np.zeros(shape, dtype=np.float32)
    for row, r in enumerate(records):
        n = len(r.ids)
        ids[row, :n], positions[row, :n], branch[row, :n], weights[row, :n] = (
            r.ids,
            r.positions,
            r.branch,
            r.weights,
        )
    slots = np.flatnonzero(ids == slot_id)
    predict = np.flatnonzero(weights)
    return Group(
        ids=torch.from_numpy(ids.ravel()),
        positions=torch.from_numpy(positions.ravel()),
        branch=torch.from_numpy(branch),
        slots=torch.from_numpy(slots),
        first_embedding=first_embedding,
        predict=torch.from_numpy(predict),
        targets=torch.from_numpy(ids.ravel()[predict + 1]),
        weights=torch.from_numpy(weights.ravel()[predict]),
        example=torch.from_numpy(predict // length + first_example),
    )
