"""Whether a device's beam kernels do what the plain way does: tried once, on made-up searches, before one is real."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from huoyan.engine.beam_ops import BeamOps
from huoyan.layers.beam_step import FACTS, HEAD, NEVER, SearchOrders

if TYPE_CHECKING:
    from torch import Tensor

    from huoyan.engine.kv_cache import KVCache


@torch.inference_mode()
def probe(ops: BeamOps, cache: KVCache, vocab_size: int, width: int) -> None:
    """Two steps of a search of that width, and the rows and blocks that come of them, beside the plain way.

    `cache` is left as it is. What is compiled here is what searches will run.

    Raises:
        RuntimeError: the plain way comes to something else.
        Exception: whatever a kernel that does not compile or run raises.
    """
    several = [steps_on_trial(each, cache, vocab_size, width) for each in (ops, BeamOps())]
    for mine, plain in zip(*several, strict=True):
        rounded = mine.dtype in (torch.float32, torch.float64)
        if not (torch.allclose(mine, plain, 1e-5, 1e-4) if rounded else torch.equal(mine, plain)):
            raise RuntimeError("the kernels' beams are not those of the plain way")


def steps_on_trial(ops: BeamOps, cache: KVCache, vocab_size: int, width: int) -> list[Tensor]:
    """What two made-up steps come to, and what they leave of made-up blocks; `cache` is left as it is."""
    device = cache.device
    # The likeliest are far apart and their sums too: the two ways round logarithms differently.
    count = width * vocab_size
    logits = -(torch.arange(count, device=device).mul(7919) % count).double().sqrt()
    logits = logits.float().view(width, vocab_size)
    first, state = ops.advance(logits, _orders(device, width, -1), None, 2 * width)
    second, after = ops.advance(logits, _orders(device, width, 0), state, 2 * width)
    out = [part for step in (first, second) for part in _parts(step)] + [state, after]
    # A graph's inputs (token, position, slot, length, then blocks), and the tensors of a step without a graph.
    for in_columns in (True, False):
        blocks = torch.arange(width + 8, device=device)
        small = cache.of_the_same_form(2, len(blocks))
        stored = [*small.keys.tensors, *small.values.tensors]
        for tensor in stored:
            tensor.copy_(blocks.view(-1, 1, 1, 1))
        rows = torch.arange(7, dtype=torch.int32, device=device).repeat(width + 1, 1)
        rows[:, 1] = 2 * cache.block_size + cache.block_size // 2
        rows[:, 6] = torch.arange(width + 1, device=device) + 7
        moves = torch.tensor([[1 + beam, 0, beam, 1] for beam in range(width)], device=device)
        tokens, positions, slots = rows[:, :3].unbind(1)
        if not in_columns:
            tokens, positions, slots = tokens.long(), positions.contiguous(), slots.contiguous()
        ops.move(moves, second, small, tokens, positions, slots, rows[:, 4:])
        out += [tokens, slots, rows, *(tensor.float() for tensor in stored)]
    return out


def _parts(found: Tensor) -> list[Tensor]:
    """Whole numbers apart from log-probabilities, of the beams that have them."""
    count = (found.shape[2] - FACTS) // 2
    whole = found[:, :, : FACTS + count]
    return [whole[:, 0], found[:, 0, FACTS + count :].contiguous().view(torch.float32), whole[:, :, :FACTS]]


def _orders(device: torch.device, width: int, source: int) -> SearchOrders:
    """Of a search with one beam, which nothing ends, or of what it was in the step before."""
    table = torch.full((1, SearchOrders.columns(width, 1)), -1, dtype=torch.int64)
    table[0, :5] = torch.tensor([width, source, 0, 0, -1])
    floats = table.view(torch.float64)
    floats[0, 5:HEAD] = torch.tensor([7.0, 6.0, 20.0], dtype=torch.float64)
    table[0, HEAD : HEAD + width] = torch.arange(width)
    floats[0, HEAD + width + 1 :] = NEVER
    floats[0, HEAD + width + 1] = 0.0
    return SearchOrders(table.to(device), width, 1)
