"""Time decode steps of the full-size model by replaying their CUDA graphs, and search for the best cut of each of their
products in its place.

usage: python benchmarks/decode_step.py [--int4] [--sequences 1,8,32,64,128] [--context 320] [--kernels]
                                        [--search gate_up,down,qkv,o,head] [--seconds 200] [--json OUT]   (needs CUDA)

A step is the decoder's graph and the head behind it, without the host, random weights and `--context` tokens in each
sequence's cache. `--kernels` adds what its kernels take, by torch's profiler. `--search` tries other cuts of one
product after the other, for all `--sequences` at once, and keeps what makes their steps shorter: in a step kernels
start while others end, so that the best cut of a product alone is not the best there. Every cut's answer is compared
with the one before.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from device_time import need_cuda
from full_size import write_folder
from huoyan import LLM
from huoyan.kernels import dense_matmul, int4_cuts, int4_matmul, wide_matmul
from huoyan.kernels.launching import noted_launches

Cut = Any
"""A `Tuning` of one of the kernels."""


class Steps:
    """The decode steps of a loaded model."""

    def __init__(self, int4: bool, context: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._llm = LLM(
                str(write_folder(Path(folder) / "model", int4)),
                load_format="dummy",
                max_model_len=4096,
                gpu_memory_utilization=0.7,
            )
        runner = self._llm._runtime.backend.runner
        self.model = runner.model
        self._graphs = runner._graphs
        self._cache = runner.cache
        self._context = context
        layer = self.model.llm.model.layers[0]
        self.products = {
            "gate_up": layer.mlp.gate_up_proj,
            "down": layer.mlp.down_proj,
            "qkv": layer.self_attn.qkv_proj,
            "o": layer.self_attn.o_proj,
            "head": self.model.llm.lm_head,
        }

    @torch.inference_mode()
    def replayer(self, sequences: int) -> Callable[[], torch.Tensor]:
        """Captured anew: what replays one step of so many sequences and gives its states."""
        self._graphs._graphs.clear()
        self._graphs._capture(sequences)
        graph = self._graphs._graphs[sequences]
        rng, last, size = np.random.default_rng(0), self._context - 1, self._cache.block_size
        blocks = np.array([np.arange(last // size + 1) + i * (last // size + 1) for i in range(sequences)])
        batch = SimpleNamespace(
            chunks=[None] * sequences,
            token_ids=rng.integers(0, 255, sequences),
            positions=np.full(sequences, last),
            slot_mapping=blocks[:, -1] * size + last % size,
            seq_lens=np.full(sequences, self._context),
            block_tables=blocks,
        )
        hidden = graph.replay(batch, None)[:sequences]
        torch.cuda.synchronize()

        def replay() -> torch.Tensor:
            graph._graph.replay()
            self.model.head(hidden)
            return hidden

        return replay

    @torch.inference_mode()
    def milliseconds(self, sequences: int, repeats: int = 30) -> tuple[float, torch.Tensor]:
        """(the least mean of three runs, the states)."""
        replay, times = self.replayer(sequences), []
        for _ in range(3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for i in range(3 + repeats):
                if i == 3:
                    start.record()
                states = replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / repeats)
        return min(times), states.float().clone()

    @torch.inference_mode()
    def kernels(self, sequences: int, repeats: int = 4) -> list[tuple[str, float, float]]:
        """(name, launches, microseconds of one) a step, those that take most first. They overlap."""
        from torch.profiler import ProfilerActivity, profile

        replay, found = self.replayer(sequences), collections.defaultdict(list)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(repeats):
                replay()
            torch.cuda.synchronize()
        for event in profiled.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                found[event.name].append(event.time_range.elapsed_us())
        rows = [(name, len(us) / repeats, float(np.median(us))) for name, us in found.items()]
        return sorted(rows, key=lambda row: -row[1] * row[2])


def candidates(product: str, sequences: int, int4: bool) -> Iterator[Cut]:
    """Cuts worth a try, of steps of up to so many sequences."""
    many = 1 if product in ("gate_up", "head") else 0
    int4 = int4 and product != "head"
    if int4 and sequences <= 16:
        cut = int4_cuts.Tuning
        splits = (1,) if many else (14, 13, 11, 9, 7) if product == "down" else (7, 5, 4)
        for split, (n, warps), stages, prefetch in itertools.product(
            splits, ((128, 4), (64, 4)), (4, 3, 5), (4, 8)
        ):
            yield cut(n, split, warps, stages, prefetch)
            for tail in (2, 3, 4, 6) if many else ():
                yield cut(n, split, warps, stages, prefetch, wave=2 if n == 128 else 4, tail=tail)
    elif int4:
        rows = 32 if sequences <= 32 else 64 if sequences <= 64 else 128
        splits = (1,) if many else (9, 7, 5, 4) if product == "down" else (7, 4, 3)
        for split, (n, warps), stages, prefetch in itertools.product(
            splits, ((64, 4), (128, 8), (128, 4)), (2, 3, 4), (4, 0)
        ):
            for wave, tail in ((2 if n == 128 else 4, 4), (0, 1)) if many else ((0, 1),):
                yield int4_cuts.Tuning(
                    n, split, warps, stages, prefetch, block_m=rows, scaled=True, tiles=True, wave=wave, tail=tail,
                    registers=128 if rows == 128 and warps == 8 else None,
                )  # fmt: skip
    elif sequences <= 16:
        splits = (1,) if many else (10, 8, 6, 4) if product == "down" else (7, 4, 2)
        for split, (n, warps), k, stages, prefetch in itertools.product(
            splits, ((64, 4), (128, 4), (128, 8)), (128, 64) if many else (128,), (3, 4, 6), (4, 8)
        ):
            if n * k * 2 * stages * (1 + many) <= 200_000:
                yield dense_matmul.Tuning(n, split, warps, stages, prefetch, k)
    else:
        for split, rest, k, stages, prefetch in itertools.product(
            (1,) if many else (4, 3, 2), (16, 0) if many else (0,), (128, 64), (2, 3, 4, 5), (0, 2, 8, 16)
        ):
            if (128 * (1 + many) + rest * (1 + many) + 128) * k * 2 * stages <= 220_000:
                yield wide_matmul.Tuning(128, rest, split, k, 8, stages, prefetch)


def written(cut: Cut) -> str:
    return " ".join(f"{name}={value}" for name, value in vars(cut).items() if value or name == "split")


class Cuts:
    """Cuts in place of those that the kernels choose, by the shape of a product."""

    def __init__(self) -> None:
        self.by_shape: dict[tuple[int, int], Cut] = {}
        for module, shape_at in ((int4_matmul, 1), (dense_matmul, 0)):
            self._replace(module, shape_at)
        chosen = wide_matmul.choose

        def choose_wide(rows: int, n: int, k: int, gated: bool, processors: int) -> Cut:
            return self.by_shape.get((2 * n if gated else n, k)) or chosen(rows, n, k, gated, processors)

        wide_matmul.choose = choose_wide

    def _replace(self, module: ModuleType, shape_at: int) -> None:
        chosen = module.choose

        def choose(*args: Any) -> Cut:
            n, k = args[shape_at : shape_at + 2]
            # A dense gate's outputs are counted once.
            return self.by_shape.get((n, k)) or self.by_shape.get((2 * n, k)) or chosen(*args)

        module.choose = choose


def search(
    steps: Steps, products: list[str], sequences: list[int], int4: bool, seconds: float
) -> dict[str, str]:
    """Prints every cut's times; returns the best of each product."""
    begun, cuts = time.monotonic(), Cuts()
    shapes = {name: layer_shape(layer) for name, layer in steps.products.items()}

    def times() -> dict[int, tuple[float, torch.Tensor]]:
        return {count: steps.milliseconds(count) for count in sequences}

    base = times()
    print("as chosen", {count: round(ms, 4) for count, (ms, _) in base.items()}, flush=True)
    best, kept = float(len(sequences)), {}
    for name in products:
        tried = list(candidates(name, max(sequences), int4))
        compile_ahead(steps, name, max(sequences), tried)
        for cut in tried:
            if time.monotonic() - begun > seconds:
                print("out of time", flush=True)
                return kept
            before = cuts.by_shape.get(shapes[name])
            cuts.by_shape[shapes[name]] = cut
            try:
                got = times()
            except Exception as error:  # a cut that does not fit the device is no candidate
                print(f"{name:8} {written(cut)}: does not run ({str(error).splitlines()[:1]})", flush=True)
                got = {}
            off = max((float((got[n][1] - base[n][1]).norm() / base[n][1].norm()) for n in got), default=1.0)
            score = sum(got[n][0] / base[n][0] for n in got) if off < 0.05 else float("inf")
            better = 0 < score < best - 1e-3
            if got:
                shown = {n: round(ms, 4) for n, (ms, _) in got.items()}
                print(f"{name:8} {written(cut):70} {shown} off {off:.3f}{' <' if better else ''}", flush=True)
            if better:
                best, kept[name] = score, written(cut)
            elif before is None:
                del cuts.by_shape[shapes[name]]
            else:
                cuts.by_shape[shapes[name]] = before
    print("best", kept, {count: round(ms, 4) for count, (ms, _) in times().items()}, flush=True)
    return kept


def layer_shape(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a product, dense or int4."""
    return (layer.width_out if hasattr(layer, "width_out") else len(layer.weight)), layer.width_in


def compile_ahead(steps: Steps, name: str, rows: int, cuts: list[Cut]) -> None:
    """What does not compile is said when it is tried."""
    layer, gated = steps.products[name], name == "gate_up"
    parts = name not in ("gate_up", "head")
    x = torch.zeros(rows, layer.width_in, device="cuda", dtype=steps.model.dtype)
    with torch.inference_mode(), noted_launches() as noted:
        for cut in cuts:
            if isinstance(cut, int4_cuts.Tuning):
                int4_matmul.int4_matmul(x, layer.packed, layer.meta, parts=parts, gated=gated, tuning=cut)
            elif isinstance(cut, dense_matmul.Tuning):
                dtype = torch.float32 if name == "head" else None
                dense_matmul.dense_matmul(x, layer.weight, gated=gated, parts=parts, dtype=dtype, tuning=cut)
            else:
                wide_matmul.wide_matmul(x, layer.weight, gated=gated, tuning=cut)
    noted.compile(x.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--int4", action="store_true")
    parser.add_argument("--sequences", default="1,8,32,64,128")
    parser.add_argument("--context", type=int, default=320, help="tokens of each sequence")
    parser.add_argument("--kernels", action="store_true", help="what each kernel of a step takes")
    parser.add_argument("--search", help="products whose cuts are searched")
    parser.add_argument("--seconds", type=float, default=200, help="of a search")
    parser.add_argument("--json")
    args = parser.parse_args()
    need_cuda()
    sequences = [int(count) for count in args.sequences.split(",")]
    steps, results = Steps(args.int4, args.context), {}
    if args.search:
        results["best"] = search(steps, args.search.split(","), sequences, args.int4, args.seconds)
    else:
        results["ms"] = {count: steps.milliseconds(count)[0] for count in sequences}
        for count, ms in results["ms"].items():
            print(
                f"{count:4} sequences {ms:8.4f} ms a step, {count / ms * 1000:8.0f} tokens a second",
                flush=True,
            )
    if args.kernels:
        results["kernels"] = {count: steps.kernels(count) for count in sequences}
        for count, rows in results["kernels"].items():
            print(f"{count} sequences:")
            for name, launches, us in rows[:16]:
                print(f"  {launches:6.1f} x {us:8.1f} us  {name[:70]}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
