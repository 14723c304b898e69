"""Rows times an int4 matrix on a CPU in bfloat16: torch's packed product beside dense blocks, on the model's shapes.

    python benchmarks/int4_cpu.py [--rows 64 128 256 640] [--threads 2]

Milliseconds of each, least of some rounds that alternate, and how many times as fast the blocks are. The
engine takes the product up to `FEW_ROWS_CPU` rows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from unittest import mock

import torch

from huoyan.layers import int4_cpu
from huoyan.planning.pieces import FEW_ROWS_CPU

SHAPES = {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
GROUP = 128


def milliseconds(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, few_rows: int) -> float:
    with mock.patch.object(int4_cpu, "FEW_ROWS_CPU", few_rows):
        begun = time.perf_counter()
        int4_cpu.multiply(x, packed, scales)
        return (time.perf_counter() - begun) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, FEW_ROWS_CPU, 256, 640])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not int4_cpu.unpacking_pays():
        raise SystemExit(
            f"{Path(__file__).name}: this processor takes torch's product for any number of rows"
        )
    print(
        f"threads {args.threads}, times as fast by blocks"
        f"\n{'matrix':>8} {'rows':>5} {'product':>9} {'blocks':>9}"
    )
    for name, (out, width) in SHAPES.items():
        packed = int4_cpu.pack(torch.randint(0, 16, (out, width), dtype=torch.uint8))
        scales = torch.rand(width // GROUP, out, 2).bfloat16()
        for rows in args.rows:
            x = torch.randn(rows, width).bfloat16()
            times = [
                [milliseconds(x, packed, scales, few) for few in (rows, 0)] for _ in range(args.rounds + 1)
            ][1:]
            product, blocks = map(min, zip(*times, strict=True))
            print(f"{name:>8} {rows:5} {product:9.2f} {blocks:9.2f} {product / blocks:6.2f}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
