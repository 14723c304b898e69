"""Greedy answers in plain PyTorch, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.patches import Grid, normalise
from tiny_trainer.attention import CachedAttention


@dataclass(frozen=True, eq=False)
class Prompted:
    """Slices of one example and the prompts (token ids) that are asked about them."""

    patches: NDArray[np.uint8]
    grids: tuple[Grid, ...]
    prompts: tuple[tuple[int, ...], ...]


@torch.no_grad()
def greedy_answers(
    model: MiniCPMV,
    prompted: Sequence[Prompted],
    slot_id: int,
    stop_id: int,
    *,
    max_tokens: int = 96,
    rows: int = 512,
    slices: int = 512,
) -> list[list[list[int]]]:
    """For each example, for each of its prompts, the ids of the answer without the stop token.

    Args:
        rows, slices: how many prompts, and pictures' slices, go through the model at once.
    """
    out: list[list[list[int]]] = [[[] for _ in p.prompts] for p in prompted]
    order = sorted(range(len(prompted)), key=lambda i: (max(map(len, prompted[i].prompts), default=0), i))
    chunk: list[int] = []
    for i in order:
        candidate = [*chunk, i]
        if chunk and (
            sum(len(prompted[c].prompts) for c in candidate) > rows
            or sum(len(prompted[c].grids) for c in candidate) > slices
        ):
            _answer_chunk(model, prompted, chunk, slot_id, stop_id, max_tokens, out)
            candidate = [i]
        chunk = candidate
    if chunk:
        _answer_chunk(model, prompted, chunk, slot_id, stop_id, max_tokens, out)
    return out


def _answer_chunk(
    model: MiniCPMV,
    prompted: Sequence[Prompted],
    chunk: Sequence[int],
    slot_id: int,
    stop_id: int,
    max_tokens: int,
    out: list[list[list[int]]],
) -> None:
    device = model.device
    grids = [grid for i in chunk for grid in prompted[i].grids]
    if grids:
        pixels = torch.from_numpy(np.concatenate([prompted[i].patches for i in chunk])).to(device)
        embeddings = model.encode_patches(
            normalise(pixels, model.norm_mean, model.norm_std, model.dtype), grids
        )
    owners = [(i, k) for i in chunk for k in range(len(prompted[i].prompts))]
    lengths = [len(prompted[i].prompts[k]) for i, k in owners]
    longest = max(lengths)
    ids = np.zeros((len(owners), longest), dtype=np.int64)
    pick: list[int] = []
    first = {}
    at = 0
    for i in chunk:
        first[i] = at
        at += len(prompted[i].grids)
    for row, (i, k) in enumerate(owners):
        ids[row, : lengths[row]] = prompted[i].prompts[k]
        pick += range(first[i], first[i] + len(prompted[i].grids))
    tokens = torch.from_numpy(ids).to(device)
    slots = torch.from_numpy(np.flatnonzero(ids == slot_id)).to(device)
    x = model.embed(tokens.flatten())
    if grids:
        x = x.index_copy(0, slots, embeddings[torch.tensor(pick, device=device)].flatten(0, 1))
    count = len(owners)
    attend = CachedAttention(count, longest + max_tokens)
    positions = torch.arange(longest, device=device).expand(count, -1)
    hidden = model.decoder(x, positions.flatten(), attend.at(positions))
    next_position = torch.tensor(lengths, device=device)
    last = hidden.unflatten(0, (count, longest))[torch.arange(count, device=device), next_position - 1]
    done = torch.zeros(count, dtype=torch.bool, device=device)
    produced = []
    for step in range(max_tokens):
        chosen = model.logits(last).argmax(-1)
        produced.append(torch.where(done, stop_id, chosen))
        done |= chosen == stop_id
        # Looking costs a wait for the device, so not at every step.
        if step % 4 == 3 and bool(done.all()):
            break
        if step + 1 < max_tokens:
            at_rows = next_position[:, None]
            last = model.decoder(model.embed(chosen), next_position, attend.at(at_rows))
            next_position = next_position + 1
    for (i, k), row in zip(owners, torch.stack(produced, dim=1).tolist(), strict=True):
        out[i][k] = row[: row.index(stop_id)] if stop_id in row else row
