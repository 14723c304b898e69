"""Time the products of few rows, int4 and dense, on the model's shapes, and search for the best cut of each.

usage: python benchmarks/few_rows.py [--search] [--rows 1,4,16] [--kinds int4,dense] [--shapes qkv,o,gate_up,down,head]
                                     [--seconds N] [--json OUT]   (needs CUDA)

Prints, for each shape and number of rows, microseconds, terabytes a second of weight read, and the share of the
fastest that anything read here; beside dense products what torch's takes. Products follow each other as in a decode
step: replayed from a CUDA graph, over more weights than the cache holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from device_time import time_us
from huoyan.kernels import dense_matmul, int4_matmul, wide_matmul
from huoyan.kernels.add_rms_norm import add_rms_norm
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
        self.words = [int4_matmul.pack_words(q).roll(i, 0) for i in range(copies)]
        scales = torch.rand(self.n, self.k // GROUP, device="cuda") * 0.01
        zeros = torch.randint(0, 16, (self.n, self.k // GROUP), device="cuda")
        self.meta = int4_matmul.pack_meta(scales, zeros, torch.float16)
        self.moved = self.n * self.k / 2 + 4 * self.n * self.k / GROUP
        self.dtype = torch.float16
        self.norm = torch.ones(self.n, device="cuda", dtype=self.dtype)
        self.residual = torch.randn(192, self.n, device="cuda").to(self.dtype)

    def run(self, x: torch.Tensor, tuning, i: int) -> torch.Tensor:
        return int4_matmul.int4_matmul(
            x, self.words[i % len(self.words)], self.meta, parts=True, tuning=tuning
        )  # fmt: skip

    def tunings(self, rows: int):
        """By promise, see benchmarks/NOTES.md: what fills a processor, then what fills whole rounds of them."""
        cut = int4_matmul.Tuning
        if rows <= 16:
            wide = {"warps": 8, "prefetch": 4, "tiles": True}
            narrow = {"warps": 4, "prefetch": 4, "tiles": True}
            if self.way == "gated":
                yield cut(64, 1, stages=4, wave=4, tail=2, **narrow)
                yield cut(64, 1, stages=6, wave=4, tail=2, **narrow)
                yield cut(64, 2, stages=4, **narrow)
                yield cut(128, 2, stages=4, **wide)
                yield cut(64, 1, stages=6, **narrow)
                yield cut(128, 1, stages=4, wave=2, tail=4, **wide)
                yield cut(64, 2, stages=3, **narrow)
                yield cut(64, 1, stages=4, wave=4, tail=2, scaled=True, **narrow)
                yield cut(64, 1, stages=4, wave=4, tail=2, warps=4, prefetch=4)
                yield cut(128, 2, stages=4, scaled=True, **wide)
                yield cut(128, 4, stages=3, **wide)
                yield cut(128, 2, stages=4, registers=128, warps=4, prefetch=4, tiles=True)
                return
            long = self.k > 10000
            for split in (14, 7) if long else (7, 4):
                yield cut(64, split, stages=4, **narrow)
                yield cut(64, split, stages=6, **narrow)
            yield cut(128, 14 if long else 7, stages=4, **wide)
            yield cut(128, 9 if long else 4, stages=6, **wide)
            yield cut(64, 7, stages=8, **narrow)
            yield cut(64, 14, stages=3, **narrow)
            yield cut(64, 14 if long else 7, stages=4, prefetch=8, warps=4, tiles=True)
            yield cut(64, 14 if long else 7, stages=4, warps=4, prefetch=4)
            yield cut(128, 14 if long else 7, stages=4, warps=4, prefetch=4)
            yield cut(64, 19 if long else 9, stages=4, **narrow)
            return
        common = {"scaled": True, "tiles": True, "block_m": 64 if rows <= 64 else 128}
        if self.way == "gated":
            # Two programs a processor, or three.
            if rows <= 64:
                yield cut(128, 1, 8, 3, wave=2, tail=4, **common)
                yield cut(128, 1, 8, 4, wave=2, tail=4, **common)
                yield cut(64, 1, 4, 3, wave=4, tail=2, **common)
                yield cut(128, 1, 4, 3, **common)
                yield cut(64, 1, 4, 3, **common)
                yield cut(64, 1, 4, 2, **common)
                yield cut(128, 1, 8, 3, **common)
                yield cut(256, 1, 16, 3, wave=1, tail=4, registers=128, **common)
                yield cut(64, 1, 4, 3, scaled=True, block_m=64)
                return
            for tail in (7, 1, 4):
                yield cut(128, 1, 8, 2, registers=128, wave=2, tail=tail, **common)
            yield cut(256, 1, 16, 3, registers=128, wave=1, tail=7, **common)
            yield cut(256, 1, 16, 4, registers=128, wave=1, tail=7, **common)
            yield cut(256, 1, 16, 3, registers=128, wave=1, tail=4, **common)
            yield cut(128, 1, 8, 3, wave=2, tail=4, **common)
            yield cut(64, 1, 4, 2, registers=168, wave=4, tail=2, **common)
            yield cut(64, 1, 4, 3, scaled=True, tiles=True, block_m=64)
            yield cut(64, 1, 4, 3, scaled=True, block_m=64)
            return
        splits = (9, 4, 14, 7) if self.k > 10000 else (7, 4)
        full = {"registers": None if rows <= 64 else 128}
        for split in splits:
            yield cut(128, split, 8, 3 if rows <= 64 else 2, **full, **common)
        for split in splits[:2]:
            yield cut(64, split, 4, 3 if rows <= 64 else 2, **common)
        yield cut(128, 1, 8, 2, registers=128, wave=2, tail=splits[0], **common)
        yield cut(256, splits[0], 16, 3, registers=128, **common)
        yield cut(128, splits[0], 8, 3 if rows <= 64 else 2, **full, prefetch=4, **common)
        yield cut(128, splits[1], 8, 4 if rows <= 64 else 3, **common)
        yield cut(128, splits[1], 4, 3, **common)
        if rows > 64:
            yield cut(128, splits[1], 4, 3, block_m=64, scaled=True, tiles=True)

    def compile_ahead(self, x: torch.Tensor, tuning) -> None:
        int4_matmul.compile_ahead(x, self.words[0], self.meta, parts=True, tuning=tuning)

    def read(self, y: torch.Tensor) -> None:
        """What is next in a step, or what reads as it does: many parts cost there what they gain here."""
        if self.way == "gated":
            silu_mul(y, self.dtype)
        else:
            add_rms_norm(y, self.residual[: y.shape[-2]], self.norm, 1e-6)

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
        if len(x) > dense_matmul.MAX_ROWS:
            return wide_matmul.wide_matmul(x, self.weights[i % len(self.weights)], gated=self.way == "gated")
        return dense_matmul.dense_matmul(
            x, self.weights[i % len(self.weights)], gated=self.way == "gated", parts=self.way == "parts",
            dtype=dtype, tuning=tuning,
        )  # fmt: skip

    def tunings(self, rows: int):
        if rows > dense_matmul.MAX_ROWS:
            return
        splits = (1,) if self.way != "parts" else (1, 2, 4, 7) if self.k < 10000 else (4, 6, 8)
        for (n, warps), k, split, stages, prefetch in itertools.product(
            ((64, 4), (128, 4), (128, 8)), (64, 128), splits, (3, 4, 6), (0, 4)
        ):
            fetched = n * k * 2 * stages * (2 if self.way == "gated" else 1)
            if fetched <= 200_000:
                yield dense_matmul.Tuning(n, split, warps, stages, prefetch, k)

    def other(self, x: torch.Tensor, i: int):
        plain = torch.nn.functional.linear(x, self.weights[i % len(self.weights)])
        return silu_mul(plain) if self.way == "gated" and len(x) > dense_matmul.MAX_ROWS else plain


def short(tuning) -> str:
    """What of it is not as it is left out."""
    if tuning is None:
        return "chosen"
    given = {f.name: getattr(tuning, f.name) for f in dataclasses.fields(tuning)}
    first = ",".join(str(given.pop(name)) for name in ("block_n", "split", "warps", "stages"))
    defaults = {f.name: f.default for f in dataclasses.fields(tuning)}
    return " ".join([f"({first})", *(f"{k}={v}" for k, v in given.items() if v != defaults[k])])


def search_int4(shapes: list[str], rows: list[int], seconds: float, out: str | None) -> None:
    """Time cuts together with the kernel that reads what they give, the most promising of every shape first, until
    the seconds are over; threads compile them first, in at most two thirds of the time. Their results are compared
    with a plain product's."""
    begun = time.monotonic()
    operands, jobs, wants = {}, [], {}
    for name in shapes:
        shape = Int4(name)
        dense = int4_matmul.dequantize_reference(shape.words[0], shape.meta, torch.float16)
        for m in rows:
            x = torch.randn(m, shape.k, device="cuda").half()
            operands[name, m] = shape, x
            wants[name, m] = x.float() @ dense.T
            jobs += [(rank, name, m, tuning) for rank, tuning in enumerate([None, *shape.tunings(m)])]
        del dense
    jobs.sort(key=lambda job: job[0])
    print(f"{len(jobs)} cuts, {time.monotonic() - begun:.1f} s of preparation", flush=True)
    timed: dict[tuple[str, int], list] = {key: [] for key in operands}
    broken, left = [], 0
    ahead: dict[object, Future] = {}

    def kernel_of(name: str, m: int, tuning) -> object:
        if tuning is None:
            return name, m
        return tuning, name if tuning.wave else "", m <= tuning.block_m

    with ThreadPoolExecutor(16) as pool:
        for _, name, m, tuning in jobs:
            key, (shape, x) = kernel_of(name, m, tuning), operands[name, m]
            if key not in ahead:
                ahead[key] = pool.submit(shape.compile_ahead, x, tuning)
        wait(ahead.values(), timeout=max(0.0, begun + seconds * 2 / 3 - time.monotonic()))
        for compiled in ahead.values():
            compiled.cancel()
    compiled_s = time.monotonic() - begun
    print(
        f"{sum(not c.cancelled() for c in ahead.values())} of {len(ahead)} kernels at {compiled_s:.1f} s",
        flush=True,
    )
    for _, name, m, tuning in jobs:
        compiled = ahead[kernel_of(name, m, tuning)]
        if compiled.cancelled() or time.monotonic() - begun > seconds:
            left += 1
            continue
        shape, x = operands[name, m]
        try:
            compiled.result()
            y = shape.run(x, tuning, 0).float()
            y = y.sum(0) if y.dim() == 3 else y
            error = float((y - wants[name, m]).norm() / wants[name, m].norm())
            if not error < 2e-3:
                raise AssertionError(f"wrong by {error:.1e}")
            us = time_us(lambda i: shape.read(shape.run(x, tuning, i)))  # noqa: B023
        except Exception as failure:  # a cut that does not fit the device is no candidate
            broken.append((name, m, short(tuning), (str(failure).splitlines() or [repr(failure)])[0][:150]))
            continue
        timed[name, m].append((us, tuning))
    result = []
    for (name, m), all_timed in timed.items():
        shape, x = operands[name, m]
        best = sorted(all_timed, key=lambda t: t[0])[:5]
        chosen = [t for t in all_timed if t[1] is None]
        print(f"int4 {m:3} rows {name}, us with what reads it (alone, TB/s):")
        for us, tuning in best + [t for t in chosen if t not in best]:
            try:
                alone = time_us(lambda i: shape.run(x, tuning, i))  # noqa: B023
            except Exception as failure:  # a kernel before may have broken the device for all that follow
                print("  ", failure)
                alone = float("nan")
            print(f"  {us:7.2f} ({alone:7.2f}, {shape.moved / alone / 1e6:.2f}) {short(tuning)}", flush=True)
            cut = dataclasses.asdict(tuning) if tuning else None
            result.append({"shape": name, "rows": m, "us_with_next": us, "us": alone, "tuning": cut})
        all_cuts = [(us, short(tuning)) for us, tuning in all_timed]
        result.append({"shape": name, "rows": m, "all": all_cuts})
    for failure in broken:
        print("  does not run:", *failure)
    print(f"{time.monotonic() - begun:.1f} s, {left} of {len(jobs)} cuts left out", flush=True)
    if out:
        with open(out, "w") as file:
            json.dump({"cuts": result, "broken": broken}, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--kinds", default="int4,dense")
    parser.add_argument("--seconds", type=float, default=200, help="of search, all together")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [int(m) for m in args.rows.split(",")]
    shapes = args.shapes.split(",")
    if args.search and args.kinds == "int4":
        search_int4([name for name in shapes if name != "head"], rows, args.seconds, args.json)
        return
    begun = time.monotonic()
    results = []
    for kind, name in itertools.product(args.kinds.split(","), shapes):
        if (kind, name) == ("int4", "head"):
            continue
        shape = {"int4": Int4, "dense": Dense}[kind](name)
        for m in rows:
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
