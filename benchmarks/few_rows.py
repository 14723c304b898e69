"""Time the products of few rows, int4 and dense, on the model's shapes, and search for the best cut of each.

usage: python benchmarks/few_rows.py [--search] [--rows 1,4,16] [--kinds int4,dense] [--json OUT]   (needs CUDA)

Prints, for each shape and number of rows, microseconds, terabytes a second of weight read, and the share of the
fastest that anything read here; beside dense products what torch's takes. Products follow each other as in a decode
step: replayed from a CUDA graph, over more weights than the cache holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from device_time import time_us
from huoyan.kernels import dense_matmul, int4_matmul

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
        self.words = [int4_matmul.pack_words(q).roll(i, 0) for i in range(copies)]
        scales = torch.rand(self.n, self.k // GROUP, device="cuda") * 0.01
        zeros = torch.randint(0, 16, (self.n, self.k // GROUP), device="cuda")
        self.meta = int4_matmul.pack_meta(scales, zeros, torch.float16)
        self.moved = self.n * self.k / 2 + 4 * self.n * self.k / GROUP
        self.dtype = torch.float16

    def run(self, x: torch.Tensor, tuning, i: int) -> torch.Tensor:
        return int4_matmul.int4_matmul(
            x, self.words[i % len(self.words)], self.meta, parts=True, tuning=tuning
        )  # fmt: skip

    def tunings(self, rows: int):
        splits = (1, 2) if self.way == "gated" else (4, 7) if self.k < 10000 else (8, 11)
        if rows > 16:
            for (n, warps), split, stages, m, unroll in itertools.product(
                ((64, 4), (128, 4), (128, 8)), splits, (3, 4), (32, 64) if rows <= 64 else (64, 128), (1, 2)
            ):
                yield int4_matmul.Tuning(n, split, warps, stages, 0, m, False, unroll)
            return
        for (n, warps, m), split, stages, unroll in itertools.product(
            ((64, 4, 16), (128, 4, 16)), splits, (3, 4, 6), (1, 2)
        ):  # fmt: skip
            if m >= rows:
                yield int4_matmul.Tuning(n, split, warps, stages, 4, m, False, unroll)

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

    def run(self, x: torch.Tensor, tuning, i: int) -> torch.Tensor:
        dtype = torch.float32 if self.way == "float32" else None
        return dense_matmul.dense_matmul(
            x, self.weights[i % len(self.weights)], gated=self.way == "gated", parts=self.way == "parts",
            dtype=dtype, tuning=tuning,
        )  # fmt: skip

    def tunings(self, rows: int):
        if rows > 16:
            yield from self._tunings_of_many(64 if rows <= 64 else 128)
            return
        splits = (1,) if self.way != "parts" else (1, 2, 4, 7) if self.k < 10000 else (4, 6, 8)
        for (n, warps), k, split, stages, prefetch in itertools.product(
            ((64, 4), (128, 4), (128, 8)), (64, 128), splits, (3, 4, 6), (0, 4)
        ):
            fetched = n * k * 2 * stages * (2 if self.way == "gated" else 1)
            if fetched <= 200_000:
                yield dense_matmul.Tuning(n, split, warps, stages, prefetch, k)

    def _tunings_of_many(self, m: int):
        splits = (1,) if self.way != "parts" else (2, 3, 4, 7) if self.k < 10000 else (4, 5, 8)
        for (n, warps), k, split, stages in itertools.product(
            ((128, 8), (64, 4), (128, 4), (256, 8)), (64, 128), splits, (3, 4, 5)
        ):
            fetched = (n * (2 if self.way == "gated" else 1) + m) * k * 2 * stages
            if fetched <= 220_000 and not (self.way == "gated" and n > 128):
                yield dense_matmul.Tuning(n, split, warps, stages, 4, k, m)

    def other(self, x: torch.Tensor, i: int):
        return torch.nn.functional.linear(x, self.weights[i % len(self.weights)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--kinds", default="int4,dense")
    parser.add_argument("--seconds", type=float, default=200, help="of search, all together")
    parser.add_argument("--json")
    args = parser.parse_args()
    begun = time.monotonic()
    results = []
    for kind, name in itertools.product(args.kinds.split(","), SHAPES):
        if (kind, name) == ("int4", "head"):
            continue
        shape = {"int4": Int4, "dense": Dense}[kind](name)
        for m in map(int, args.rows.split(",")):
            x = torch.randn(m, shape.k, device="cuda").to(shape.dtype)
            tunings = [None]
            if args.search and time.monotonic() - begun < args.seconds:
                tunings += list(shape.tunings(m))

            def build(tuning):
                try:
                    shape.run(x, tuning, 0)  # noqa: B023
                except Exception as failure:  # a cut that does not fit the device is no candidate
                    return failure
                return None

            with ThreadPoolExecutor(16) as pool:
                broken = list(pool.map(build, tunings))
            failed = [error for error in broken if error is not None]
            if broken[0] is not None:
                print(kind, name, m, "does not run:", str(broken[0]).splitlines()[:1], flush=True)
            timed = [
                (time_us(lambda i: shape.run(x, tuning, i)), tuning)  # noqa: B023
                for tuning, error in zip(tunings, broken, strict=True)
                if error is None
            ]
            if not timed:
                continue
            best = sorted(timed, key=lambda t: t[0])[:30]
            row = {
                "kind": kind, "rows": m, "shape": name, "us": timed[0][0], "TB/s": shape.moved / timed[0][0] / 1e6,
                "best": [(us, vars(tuning) if tuning else None) for us, tuning in best],
            }  # fmt: skip
            line = f"{kind:5} {m:3} rows {name:8} {timed[0][0]:8.2f} us {row['TB/s']:.2f} TB/s"
            if len(timed) > 1:
                line += f"  best {best[0][0]:8.2f} us {shape.moved / best[0][0] / 1e6:.2f} TB/s"
                line += " " + " ".join(str(tuple(vars(t).values()) if t else "chosen") for _, t in best[:3])
                line += f" ({len(failed)} of {len(tunings)} do not run)"
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
