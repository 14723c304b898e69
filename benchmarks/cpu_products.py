"""Rows times a matrix on a CPU in bfloat16, on the model's shapes: two ways, and how many times as fast the second is.

    python benchmarks/cpu_products.py [int4|bf16] [--rows 1 64 128 256 640] [--threads 2]

`int4`: torch's packed product, and dense blocks; the engine takes the first up to `FEW_ROWS_CPU` rows. `bf16`: the
matrix as the checkpoint has it, and in oneDNN's order. Milliseconds, least of some rounds that alternate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeAlias
from unittest import mock

import torch
from torch import nn

from huoyan.layers import int4_cpu
from huoyan.layers.cpu import multiplies_bfloat16
from huoyan.layers.linear import Linear, lay_out_for_cpu
from huoyan.planning.pieces import FEW_ROWS_CPU

SHAPES = {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
GROUP = 128
Way: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def int4(out: int, width: int) -> tuple[Way, Way]:
    packed = int4_cpu.pack(torch.randint(0, 16, (out, width), dtype=torch.uint8))
    scales = torch.rand(width // GROUP, out, 2).bfloat16()

    def multiply(x: torch.Tensor, few_rows: int) -> torch.Tensor:
        with mock.patch.object(int4_cpu, "FEW_ROWS_CPU", few_rows):
            return int4_cpu.multiply(x, packed, scales)

    return lambda x: multiply(x, len(x)), lambda x: multiply(x, 0)


def bf16(out: int, width: int) -> tuple[Way, Way]:
    plain, reordered = (Linear(width, (out,), bias=False).bfloat16() for _ in range(2))
    lay_out_for_cpu(nn.ModuleList([reordered]))
    return plain, reordered


def milliseconds(way: Way, x: torch.Tensor) -> float:
    begun = time.perf_counter()
    way(x)
    return (time.perf_counter() - begun) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("weights", choices=["int4", "bf16"], nargs="?", default="int4")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, FEW_ROWS_CPU, 256, 640])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not (multiplies_bfloat16() if args.weights == "bf16" else int4_cpu.unpacking_pays()):
        raise SystemExit("cpu_products: this processor has the first way alone")
    ways, names = (int4, ("packed", "blocks")) if args.weights == "int4" else (bf16, ("plain", "reordered"))
    print(f"threads {args.threads}\n{'matrix':>8} {'rows':>5} {names[0]:>9} {names[1]:>9}  ratio")
    for name, shape in SHAPES.items():
        both = ways(*shape)
        for rows in args.rows:
            x = torch.randn(rows, shape[1]).bfloat16()
            times = [[milliseconds(way, x) for way in both] for _ in range(args.rounds + 1)][1:]
            first, second = map(min, zip(*times, strict=True))
            print(f"{name:>8} {rows:5} {first:9.2f} {second:9.2f} {first / second:6.2f}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
