"""Time what a step of a beam search takes beside its logits: candidates, decisions, rows, copies of blocks.

usage: python benchmarks/beam_kernels.py [--widths 3,8] [--vocab 151666]   (needs CUDA)

Prints microseconds of each part by our kernels and by torch's operations, replayed from a CUDA graph, so that they
are the device's time and not the host's. The cache is that of the published model in bfloat16, blocks of 16 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from device_time import need_cuda, time_us
from huoyan.engine.beam_ops import BeamOps
from huoyan.engine.kv_cache import KVCache
from huoyan.layers.beam_step import EOS, HEAD, LAST, NEVER, POWER, SOURCE, WIDTH, SearchOrders

BLOCK_SIZE = 16
CONTEXT = 2048


def orders_of(width: int, device: torch.device) -> SearchOrders:
    """One search whose beams are all alive."""
    table = torch.full((1, SearchOrders.columns(width, 2)), -1, dtype=torch.int64)
    floats = table.view(torch.float64)
    table[0, WIDTH], table[0, SOURCE], table[0, LAST], table[0, EOS] = width, -1, 0, 7
    table[0, 2] = 0
    floats[0, POWER:HEAD] = torch.tensor([100.0, 99.0, 2000.0], dtype=torch.float64)
    table[0, HEAD : HEAD + width] = torch.arange(width)
    first = HEAD + width + 2
    floats[0, first:] = NEVER
    floats[0, first : first + width] = -torch.arange(width, dtype=torch.float64)
    return SearchOrders(table.to(device), width, 2)


@torch.inference_mode()
def measure(ops: BeamOps, width: int, vocab: int, device: torch.device) -> dict[str, float]:
    logits = torch.randn(width, vocab, device=device).mul(3).bfloat16().float()
    orders = orders_of(width, device)
    found, state = ops.advance(logits, orders, None, 2 * width)
    columns = CONTEXT // BLOCK_SIZE
    cache = KVCache(28, width * columns, BLOCK_SIZE, 4, 128, torch.bfloat16, device)
    rows = torch.arange(width * (4 + columns), dtype=torch.int32, device=device).view(width, -1)
    rows.remainder_(width * columns)
    rows[:, 1] = CONTEXT - BLOCK_SIZE // 2
    rows[:, 3 + columns] = torch.arange(width, device=device)
    moves = torch.tensor([[beam, 0, beam, 0] for beam in range(width)], device=device)
    tokens, positions, slots = rows[:, :3].unbind(1)
    # One beam has all the children, so that all other blocks are written.
    forks = found.clone()
    forks[0, :, 0], forks[0, :, 2] = 0, torch.arange(width, device=device)
    alone = found.clone()
    alone[0, :, 0], alone[0, :, 2] = torch.arange(width, device=device), torch.arange(width, device=device)

    def move(step: torch.Tensor) -> Callable[[int], None]:
        return lambda: ops.move(moves, step, cache, tokens, positions, slots, rows[:, 4:])

    return {
        "candidates and decisions": time_us(lambda _: ops.advance(logits, orders, state, 2 * width)),
        "rows, nothing to copy": time_us(move(alone)),
        f"rows, {width - 1} blocks to copy": time_us(move(forks)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", default="3,8")
    parser.add_argument("--vocab", type=int, default=151666)
    given = parser.parse_args()
    need_cuda()
    from huoyan.engine.beam_ops_cuda import KernelBeamOps

    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device))
    for width in map(int, given.widths.split(",")):
        ours, torchs = (measure(ops, width, given.vocab, device) for ops in (KernelBeamOps(), BeamOps()))
        for name, value in ours.items():
            print(f"beam {width}: {name}: {value:.1f} us, by torch's operations {torchs[name]:.1f} us")


if __name__ == "__main__":
    main()
