"""Time the int4 products on the model's five shapes and search for the best cut of each.

usage: python benchmarks/int4_products.py [--search] [--json OUT]      (needs a CUDA device)

Prints, for each shape and number of rows, microseconds, terabytes a second of weight read, and the share of
what a dense matrix-vector product reads on the same device.
"""

from __future__ import annotations

import argparse
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import torch

from huoyan.kernels.int4_matmul import Tuning, choose, int4_matmul, pack_words

SHAPES = {
    "qkv": (4608, 3584),
    "o": (3584, 3584),
    "gate_up": (37888, 3584),
    "down": (3584, 18944),
    "head": (151680, 3584),
}


def time_us(run, repeats: int = 20) -> float:
    """Median microseconds of `run(i)` replayed from a CUDA graph over rotating operands."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(repeats):
                run(i)
        times = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / repeats)
    return sorted(times)[len(times) // 2]


def candidates(m: int):
    if m <= 4:
        for n, b, w in itertools.product((2, 4, 8, 16), (4, 8, 16), (2, 4, 8)):
            if 32 * 2 <= n * b * 16 * m <= 2048 * w and n * b * 16 >= 32 * w:
                yield "rows", Tuning(n, b, 1, w)
    for n, split, w, stages in itertools.product((32, 64, 128), (1, 2, 4, 8), (2, 4), (3, 5)):
        yield "tile", Tuning(n, 1, split, w, stages)


def operands(n: int, k: int, copies: int):
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    words = [pack_words(q).roll(i, 0) for i in range(copies)]
    scales = torch.rand(n, k // 128, device="cuda").half() * 0.01
    zeros = torch.randint(0, 16, (n, k // 128), device="cuda").half()
    return words, scales, zeros


def dense_ceiling() -> float:
    """TB/s that a dense float16 matrix-vector product of the largest shape reads."""
    dense = torch.randn(37888, 3584, device="cuda", dtype=torch.float16)
    x = torch.randn(3584, 1, device="cuda", dtype=torch.float16)
    return dense.nbytes / time_us(lambda i: dense @ x) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--json")
    args = parser.parse_args()
    ceiling = dense_ceiling()
    print(f"dense matrix-vector product reads {ceiling:.2f} TB/s")
    results = []
    for m in map(int, args.rows.split(",")):
        for name, (n, k) in SHAPES.items():
            if name == "head":
                continue
            copies = max(2, int(300e6 / (n * k / 2)))
            words, scales, zeros = operands(n, k, copies)
            x = torch.randn(m, k, device="cuda", dtype=torch.float16)
            moved = n * k / 2 + 4 * n * k / 128
            plans = [choose(m, n, k)]
            if args.search:
                plans += list(candidates(m))

                def build(plan):
                    try:
                        int4_matmul(x, words[0], scales, zeros, plan=plan)  # noqa: B023
                    except Exception as failure:  # a cut that does not fit the device is no candidate
                        return str(failure)
                    return None

                with ThreadPoolExecutor(16) as pool:
                    broken = list(pool.map(build, plans))
                plans = [p for p, error in zip(plans, broken, strict=True) if error is None]
            timed = []
            for plan in plans:
                us = time_us(lambda i: int4_matmul(x, words[i % copies], scales, zeros, plan=plan))  # noqa: B023
                timed.append((us, plan))
            chosen = timed[0]
            best = min(timed, key=lambda t: t[0])
            row = {
                "rows": m, "shape": name, "us": chosen[0], "TB/s": moved / chosen[0] / 1e6,
                "share": moved / chosen[0] / 1e6 / ceiling,
            }  # fmt: skip
            line = f"{m:3} rows {name:8} {chosen[0]:8.2f} us  {row['TB/s']:.2f} TB/s  {row['share']:.0%}"
            if args.search:
                top = sorted(timed, key=lambda t: t[0])[:3]
                row["best"] = [(us, kind, vars(t)) for us, (kind, t) in top]
                share = moved / best[0] / 1e6 / ceiling
                line += (
                    f"   best {best[0]:8.2f} us {share:.0%} {best[1][0]} {tuple(vars(best[1][1]).values())}"
                )
            print(line, flush=True)
            results.append(row)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"ceiling_tb_s": ceiling, "rows": results}, file, indent=1)


if __name__ == "__main__":
    main()
