"""What it takes on the device to choose tokens from logits: our kernels beside PyTorch's operators.

    python benchmarks/choose_rows.py            (needs CUDA)

Microseconds by device events, mean of twenty, vocabulary of MiniCPM-V 2.6. `greedy by torch` is what runs without our
kernels; floors are those of top-p 0.9, top-k 100, and top-k 100 with top-p 0.8.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from device_time import need_cuda
from huoyan.engine.plain_tokens import likeliest_reference
from huoyan.kernels.choose_rows import Draws, choose_rows
from huoyan.kernels.sampling_floors import sampling_floors

VOCAB = 151_666


def microseconds(run: Callable[[], object]) -> float:
    for _ in range(3):
        run()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun.record()
    for _ in range(20):
        run()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / 20 * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    need_cuda()
    names = ("greedy by torch", "greedy", "drawn", "floors top-p", "floors top-k", "floors both")
    print(f"{'rows':>5} " + " ".join(f"{name:>15}" for name in names))
    for rows in args.rows:
        logits = (3 * torch.randn(rows, VOCAB, device="cuda")).to(getattr(torch, args.dtype))
        warm, ones, zeros = (torch.full((rows,), value, device="cuda") for value in (0.8, 1.0, 0.0))
        all_k, some_k = (torch.full((rows,), k, dtype=torch.int32, device="cuda") for k in (0, 100))
        draws = Draws(warm, torch.arange(rows, device="cuda"))
        times = [
            microseconds(run)
            for run in (
                lambda: likeliest_reference(logits),  # noqa: B023
                lambda: choose_rows(logits),  # noqa: B023
                lambda: choose_rows(logits, draws),  # noqa: B023
                lambda: sampling_floors(logits, warm, all_k, ones * 0.9, zeros),  # noqa: B023
                lambda: sampling_floors(logits, warm, some_k, ones, zeros),  # noqa: B023
                lambda: sampling_floors(logits, warm, some_k, ones * 0.8, zeros),  # noqa: B023
            )
        ]
        print(f"{rows:5} " + " ".join(f"{time:15.1f}" for time in times), flush=True)


if __name__ == "__main__":
    main()
