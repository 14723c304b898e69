"""Time the products of few rows, int4 and dense, on the model's shapes, each by itself.

usage: python benchmarks/few_rows.py [--rows 1,4,16] [--kinds int4,dense] [--shapes qkv,o,gate_up,down,head]
                                     [--json OUT]   (needs CUDA)

Prints, for each shape and number of rows, microseconds, terabytes a second of weight read, and the share of the
fastest that anything read here; beside dense products what torch's takes. Products follow each other as in a decode
step: replayed from a CUDA graph, over more weights than the cache holds.
"""

from __future__ import annotations

import argparse
import itertools
import json

import torch

from device_time import need_cuda, time_us
from huoyan.kernels import dense_matmul, int4_matmul, int4_words, wide_matmul
from huoyan.kernels.silu_mul import silu_mul

SHAPES = {
    "qkv": (4608, 3584, "parts"),
    "o": (3584, 3584, "parts"),
    "gate_up": (37888, 3584, "gated"),
    "down": (3584, 18944, "parts"),
    "head": (151666, 3584, "float32"),
}
GROUP = 128
_ROTATED_BYTES = 300e6


class Int4:
    """One shape's int4 product."""

    def __init__(self, name: str) -> None:
        self.n, self.k, self.way = SHAPES[name]
        copies = max(2, int(_ROTATED_BYTES / (self.n * self.k / 2)))
        q = torch.randint(0, 16, (self.n, self.k), dtype=torch.uint8, device="cuda")
        self.words = [int4_words.pack_words(q).roll(i, 0) for i in range(copies)]
        scales = torch.rand(self.n, self.k // GROUP, device="cuda") * 0.01
        zeros = torch.randint(0, 16, (self.n, self.k // GROUP), device="cuda")
        self.meta = int4_words.pack_meta(scales, zeros, torch.float16)
        self.moved = self.n * self.k / 2 + 4 * self.n * self.k / GROUP
        self.dtype = torch.float16

    def run(self, x: torch.Tensor, i: int) -> torch.Tensor:
        gated = self.way == "gated"
        return int4_matmul.int4_matmul(
            x, self.words[i % len(self.words)], self.meta, parts=not gated, gated=gated
        )

    def other(self, x: torch.Tensor, i: int):
        return None


class Dense:
    """One shape's dense product."""

    def __init__(self, name: str) -> None:
        self.n, self.k, self.way = SHAPES[name]
        copies = max(2, int(_ROTATED_BYTES / (self.n * self.k * 2)))
        weight = torch.randn(self.n, self.k, device="cuda").bfloat16()
        self.weights = [weight.roll(i, 0) for i in range(copies)]
        self.moved = self.n * self.k * 2
        self.dtype = torch.bfloat16

    def run(self, x: torch.Tensor, i: int) -> torch.Tensor:
        dtype = torch.float32 if self.way == "float32" else None
        if len(x) > dense_matmul.MAX_ROWS:
            return wide_matmul.wide_matmul(x, self.weights[i % len(self.weights)], gated=self.way == "gated")
        return dense_matmul.dense_matmul(
            x, self.weights[i % len(self.weights)], gated=self.way == "gated", parts=self.way == "parts",
            dtype=dtype,
        )  # fmt: skip

    def other(self, x: torch.Tensor, i: int):
        plain = torch.nn.functional.linear(x, self.weights[i % len(self.weights)])
        return silu_mul(plain) if self.way == "gated" and len(x) > dense_matmul.MAX_ROWS else plain


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--kinds", default="int4,dense")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--json")
    args = parser.parse_args()
    need_cuda()
    results = []
    for kind, name in itertools.product(args.kinds.split(","), args.shapes.split(",")):
        if (kind, name) == ("int4", "head"):
            continue
        shape = {"int4": Int4, "dense": Dense}[kind](name)
        for m in (int(rows) for rows in args.rows.split(",")):
            x = torch.randn(m, shape.k, device="cuda").to(shape.dtype)
            us = time_us(lambda i: shape.run(x, i))  # noqa: B023
            row = {"kind": kind, "rows": m, "shape": name, "us": us, "TB/s": shape.moved / us / 1e6}
            line = f"{kind:5} {m:3} rows {name:8} {us:8.2f} us {row['TB/s']:.2f} TB/s"
            if shape.other(x, 0) is not None:
                row["torch_us"] = time_us(lambda i: shape.other(x, i))  # noqa: B023
                line += f"  torch {row['torch_us']:.2f} us"
            print(line, flush=True)
            results.append(row)
    fastest = max(row["TB/s"] for row in results)
    print(f"the fastest read {fastest:.2f} TB/s; shares of it:")
    for row in results:
        print(f"  {row['kind']:5} {row['rows']:3} rows {row['shape']:8} {row['TB/s'] / fastest:.0%}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"fastest_tb_s": fastest, "rows": results}, file, indent=1)


if __name__ == "__main__":
    main()
