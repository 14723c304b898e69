"""The plan's parts beside what a card really gives up: every constant of the memory model in one run.

usage: python benchmarks/plan_on_card.py [--formats bf16,int4] [--gpu-memory 24GiB] [--json OUT]

The full-size model with random weights, each format in a process of its own, inside the cap: loading, the KV cache, a
CUDA graph of every size, a context full of pictures, the longest strip, the largest batch, every kind of sampling, a
prompt's log-probabilities. With --json what is known is written after each load. Memory inside is torch's own counters,
outside the driver's free bytes; MiB all through. The loads run in a thread of their own, as a server's do. Everything
is run, so a cap that is too tight shows as a failed row, and so does memory that torch had to get back first.
`--toy` goes the same way at toy sizes, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

MIB = 1 << 20
FORMATS = {"bf16": "minicpm-v-2_6", "int4": "minicpm-v-2_6-int4"}
TOY = {"bf16": "small", "int4": "small-int4"}
MOMENTS = ("encoder", "beside", "decoder", "logits", "choice", "prompt_logprobs")


class Card:
    """What torch and the driver say, in bytes; nothing at all where there is no card."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None
        # What others, and the driver itself, have of the card before this process has a context.
        self.before = 0
        if self.cuda:
            query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
            said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
            self.before = int(said[0]) * MIB if said and said[0].isdigit() else 0
        self.most_allocated = self.most_reserved = self.most_taken = 0

    def read(self) -> dict[str, int]:
        """Now, and the most so far."""
        if not self.cuda:
            return dict.fromkeys(("allocated", "reserved", "outside", "most_allocated", "most_reserved"), 0)
        self.cuda.synchronize()
        free, total = self.cuda.mem_get_info()
        reserved = self.cuda.memory_reserved()
        outside = total - free - reserved - self.before
        self.most()
        # The stacks that a context begins with are given back before there is much inside.
        self.most_taken = max(self.most_taken, self.most_reserved + outside)
        return {
            "allocated": self.cuda.memory_allocated(),
            "reserved": reserved,
            "outside": outside,
            "most_allocated": self.most_allocated,
            "most_reserved": self.most_reserved,
        }

    def most(self) -> None:
        """Before torch's peaks are begun anew."""
        if self.cuda:
            self.most_allocated = max(self.most_allocated, self.cuda.max_memory_allocated())
            self.most_reserved = max(self.most_reserved, self.cuda.max_memory_reserved())

    def tidy(self) -> dict[str, int]:
        """After what torch only keeps for later was given back."""
        if self.cuda:
            self.cuda.synchronize()
            self.cuda.empty_cache()
        return self.read()

    def pools(self) -> list[dict[str, Any]]:
        """What torch keeps, by stream and pool: reserved, allocated, and how many tensors have a mebibyte or more."""
        found: dict[tuple[Any, ...], list[int]] = {}
        for segment in self.cuda.memory_snapshot() if self.cuda else []:
            pool = tuple(segment.get("segment_pool_id", (0, 0)))
            row = found.setdefault((segment["stream"], *pool, segment["segment_type"]), [0, 0, 0])
            row[0] += segment["total_size"]
            row[1] += segment["allocated_size"]
            blocks = segment["blocks"]
            row[2] += sum(b["state"] == "active_allocated" and b["size"] >= MIB for b in blocks)
        return [
            {"pool": list(pool), "reserved": reserved, "allocated": allocated, "large": large}
            for pool, (reserved, allocated, large) in sorted(found.items(), key=lambda item: -item[1][0])
        ]

    def retries(self) -> int:
        """How often torch had to give everything back to go on: each time costs milliseconds."""
        return int(self.cuda.memory_stats().get("num_alloc_retries", 0)) if self.cuda else 0


class Moments:
    """The most that each part of a step had above what there was when it began."""

    def __init__(self, engine: Any, card: Card) -> None:
        self.card = card
        self.most = dict.fromkeys(MOMENTS, 0)
        self.inside = False
        self._wrap(engine.runner, "encode", lambda pictures, beside=True: "beside" if beside else "encoder")
        self._wrap(engine.model, "decoder", lambda *a: "decoder")
        self._wrap(engine.model, "head", lambda *a: "logits")
        self._wrap(engine._chooser, "choose", lambda *a: "choice")
        self._wrap(engine, "_read_prompts", lambda *a: "prompt_logprobs")

    def _wrap(self, owner: Any, name: str, moment: Any) -> None:
        inner = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            cuda = self.card.cuda
            if cuda is None or self.inside or cuda.is_current_stream_capturing():
                return inner(*args, **kwargs)
            self.card.most()
            cuda.reset_peak_memory_stats()
            before, self.inside = cuda.memory_allocated(), True
            try:
                return inner(*args, **kwargs)
            finally:
                self.inside = False
                which = moment(*args, **kwargs)
                self.most[which] = max(self.most[which], cuda.max_memory_allocated() - before)
                self.card.most()

        owner.__dict__[name] = watched


class Run:
    """One format, from loading to the largest load."""

    def __init__(self, args: argparse.Namespace, kind: str) -> None:
        self.args, self.kind, self.card = args, kind, Card()
        self.states: dict[str, dict[str, int]] = {}
        self.loads: list[dict[str, Any]] = []
        self.graphs: dict[str, Any] = {}
        self.asked: dict[str, int] = {}
        """What the next row says of its request besides."""

    def _keep(self) -> None:
        """What is known so far: a run that is cut off has it."""
        part = {"format": self.kind, "states": self.states, "loads": self.loads, "moments": self.moments.most}
        self.args.json.write_text(json.dumps({**part, "most_taken": self.card.most_taken, "ended": False}))

    def note(self, name: str) -> None:
        self.states[name] = self.card.read()
        print(
            f"  {name:28} " + "  ".join(f"{k} {v / MIB:,.0f}" for k, v in self.states[name].items()),
            flush=True,
        )

    def _pools(self) -> list[dict[str, Any]]:
        found = self.card.pools()
        for row in found:
            numbers = f"reserved {row['reserved'] / MIB:9,.1f}  allocated {row['allocated'] / MIB:9,.1f}"
            print(f"    pool {row['pool']!s:40} {numbers}  {row['large']} large", flush=True)
        return found

    def go(self) -> dict[str, Any]:
        import torch

        from huoyan.api.llm import LLM
        from huoyan.api.loading import load_runtime
        from huoyan.api.options import parse_options
        from huoyan.bench.opened import folder_of
        from huoyan.engine import engine as engine_module
        from huoyan.engine.driver_limits import limit_cublas

        if self.card.cuda:
            limit_cublas(torch.device("cuda"))
            torch.zeros(1, device="cuda")
            self.note("a context")
        sized = engine_module.size_cache

        def size_cache(*both: Any) -> Any:
            if self.card.cuda:
                self.card.cuda.empty_cache()
            self.note("weights")
            return sized(*both)

        engine_module.size_cache = size_cache
        name = (TOY if self.args.toy else FORMATS)[self.kind]
        options = {
            "gpu_memory": self.args.gpu_memory, "max_num_seqs": self.args.max_num_seqs, "load_format": "dummy",
            "max_num_batched_tokens": self.args.max_num_batched_tokens, "kv_cache_dtype": self.args.kv_cache_dtype,
            "enable_prefix_caching": False, "enforce_eager": self.args.enforce_eager, "capture_at_start": True,
        }  # fmt: skip
        with folder_of(name, "dummy") as (folder, _):
            self.folder = Path(folder)
            runtime = load_runtime(parse_options(folder, options))
            self.engine = runtime.backend
            self.note("weights, KV cache, graphs")
            self._pools()
            self.runtime, self.llm = runtime, LLM.from_runtime(runtime)
            self.moments = Moments(self.engine, self.card)
            # As a server does: cuBLAS has workspaces of each thread's own, this one's since the graphs were captured.
            with ThreadPoolExecutor(1) as another:
                another.submit(self._loads).result()
        self.note("in the end")
        retries = self.card.retries()
        pools = self._pools()
        self._graphs()
        report = {
            "format": self.kind, "states": self.states, "loads": self.loads, "graphs": self.graphs,
            "moments": self.moments.most, "pools": pools, "retries": retries, "before": self.card.before,
            "most_taken": self.card.most_taken, "ended": True, **self._said(),
        }  # fmt: skip
        self.llm.close()
        return report

    # -- loads ----------------------------------------------------------------------------------------------

    def _loads(self) -> None:
        from huoyan.bench.requests import Requests, params

        requests = Requests(1)
        engine = self.engine
        context, seats = engine.size.max_model_len, engine.config.max_num_seqs
        self._load("one picture", lambda: [requests.pictures([(448, 448)], params(4))])
        # The largest request that is legal comes first: a run that is cut off has it.
        self._load("a context full of pictures", lambda: [self._full(requests, params(4))])
        for size in ((448, 448), (300, 600), (600, 300), (500, 400), (400, 500)):
            self._load(
                f"pictures {size}", lambda s=size: [requests.pictures([s], params(2)) for _ in range(3)], 1
            )
        self._load("the longest strip", lambda: [requests.pictures([self._strip()], params(2))])
        few = max(seats // 2, 1)
        self._load(
            "pictures beside decodes",
            lambda: [
                *(requests.words(64, params(200)) for _ in range(few)),
                *(requests.pictures([(1344, 1344)], params(8)) for _ in range(min(8, seats - few))),
            ],
        )
        length = min(self.args.batch_length, context)
        answer = max(length // 4, 2)
        count = min(engine.size.num_blocks // -(-length // engine.config.block_size), seats)
        long = params(answer)
        self._load(
            f"{count} of {length} at once",
            lambda: [requests.words(length - answer, long) for _ in range(count)],
        )
        self._load("every kind of sampling", lambda: [self._sampled(requests, i) for i in range(seats)])
        self._load("a prompt's own", lambda: [self._prompt_logprobs(requests, min(4096, context - 8))])
        self._load("the longest prompt", lambda: [requests.words(context - 8, params(8))])

    def _load(self, name: str, make: Any, concurrency: int | None = None) -> None:
        begun, before = time.perf_counter(), self.engine.stats()
        jobs = make()
        tokens = most = 0
        failed = None
        for output in self.llm.run_jobs(jobs, concurrency=concurrency or len(jobs)):
            failed = failed or output.error
            most = max(most, self.engine.stats().num_running)
            if output.finished and output.outputs:
                tokens += len(output.outputs[0].token_ids)
        found = self.card.read()
        row = {
            "load": name, "seconds": time.perf_counter() - begun, "tokens": tokens, "at_once": most,
            "preemptions": self.engine.stats().preemptions - before.preemptions, "retries": self.card.retries(),
            "error": failed, **self.asked, **found,
        }  # fmt: skip
        self.asked = {}
        self.loads.append(row)
        self._keep()
        shown = "  ".join(f"{k} {row[k] / MIB:,.0f}" for k in ("reserved", "most_reserved", "outside"))
        if "pictures" in row:
            shown += f"  {row['pictures']} pictures, {row['prompt_tokens']:,} tokens and {tokens} more"
        wrong = f"  FAILED: {failed}" if failed else ""
        head = f"  {name:28} {row['seconds']:6.1f} s  {most:4} at once  {shown}"
        print(f"{head}  retries {row['retries']}{wrong}", flush=True)

    def _full(self, requests: Any, sampling: Any) -> Any:
        """As many pictures of the most slices as the context holds."""
        from huoyan.bench.requests import size_up

        side = self.engine.model.config.vision.patch_size
        one, two = (
            size_up(self.runtime, requests.pictures([(1344, 1344)] * n, sampling), side) for n in (1, 2)
        )
        room = self.engine.size.max_model_len - one.prompt - sampling.max_tokens
        # The numbers of pictures have more digits as they go on.
        count = 1 + room // (two.prompt - one.prompt + 2)
        prompt = one.prompt + (count - 1) * (two.prompt - one.prompt)
        self.asked = {"pictures": count, "prompt_tokens": prompt}
        return requests.pictures([(1344, 1344)] * count, sampling)

    def _strip(self) -> tuple[int, int]:
        """A picture that has the slice of the most patches the engine lets through."""
        from huoyan.errors import HuoyanError
        from huoyan.media.slicing import plan_slices, read_slice_rules

        rules = read_slice_rules(self.folder)
        best, most = (448, 448), 0
        for height in (1, 2, 3):
            for width in range(4000, 300_000, 4000):
                try:
                    plan = plan_slices((width, height), rules)
                except HuoyanError:
                    continue
                sizes = [plan.overview, *([plan.cell] if plan.cell else [])]
                patches = max((w // rules.patch_size) * (h // rules.patch_size) for w, h in sizes)
                if most < patches <= self.engine.config.max_slice_patches and plan.num_slices < 64:
                    best, most = (width, height), patches
        print(f"  the longest strip: {best[0]}x{best[1]}, {most} patches in a slice")
        return best

    def _sampled(self, requests: Any, i: int) -> Any:
        from huoyan.api.sampling_params import SamplingParams

        kinds: list[dict[str, Any]] = [
            {"temperature": 1.0, "top_p": 0.9},
            {"temperature": 1.0},
            {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "logprobs": 5},
            {
                "temperature": 1.0,
                "top_p": 0.99,
                "repetition_penalty": 1.2,
                "logit_bias": {7: -2.0},
                "logprobs": 2,
            },
        ]
        return requests.words(64, SamplingParams(max_tokens=24, ignore_eos=True, **kinds[i % len(kinds)]))

    def _prompt_logprobs(self, requests: Any, length: int) -> Any:
        from huoyan.api.sampling_params import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=5)
        return requests.words(length, sampling)

    # -- graphs, by dropping them ---------------------------------------------------------------------------

    def _graphs(self) -> None:
        runner = self.engine.runner
        kinds = {
            "decode": runner._graphs,
            "steps": runner._step_graphs,
            "encoder": runner.encoder._graphs.get(False),
            "encoder beside": runner.encoder._graphs.get(True),
        }
        before = self.card.tidy()
        for name, graphs in kinds.items():
            if graphs is None:
                continue
            held = graphs._graphs
            count = sum(graph is not None for graph in held.values())
            held.clear()
            after = self.card.tidy()
            self.graphs[name] = {
                "count": count,
                "torch": before["reserved"] - after["reserved"],
                "driver": before["outside"] - after["outside"],
            }
            before = after
        print("  graphs:", self.graphs, flush=True)

    # -- the plan -------------------------------------------------------------------------------------------

    def _said(self) -> dict[str, Any]:
        from huoyan.engine.sizing import way_of_model
        from huoyan.planning.memory import cublas_bytes, graph_driver_bytes, memory
        from huoyan.planning.shapes import published_shapes

        engine, model = self.engine, self.engine.model
        config, way = engine.config, way_of_model(self.engine.model, self.engine.config)
        parts = memory(model.config, config, way, published_shapes(model.config), int4=way.int4 is not None)
        space = asdict(parts.workspace)
        driver = graph_driver_bytes(way, parts.limits) if parts.graphs else 0
        cublas = cublas_bytes(way)
        return {
            "gpu_memory": config.gpu_memory,
            "kv_tokens": engine.size.num_blocks * config.block_size,
            "kv_tokens_by_plan": parts.blocks_in(config.gpu_memory or 0) * config.block_size,
            "max_model_len": engine.size.max_model_len, "max_num_seqs": config.max_num_seqs,
            "torch_limit": engine.size.torch_bytes,
            "said": {
                "weights": parts.weights.total, "kv": engine.size.total_bytes, **space,
                "workspace": parts.workspace.total, "pictures": parts.pictures, "graphs": parts.graphs,
                "graphs_driver": driver, "between": parts.slack - cublas, "cublas": cublas,
                "context": parts.context, "fixed": parts.fixed,
            },
        }  # fmt: skip


def rows(report: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """(part, predicted, measured) in MiB."""
    said, states, moments = report["said"], report["states"], report["moments"]
    weights, end = states["weights"], states["in the end"]
    cache = states["weights, KV cache, graphs"]
    graphs = report["graphs"]
    inside = end["most_reserved"]
    pools = sum(found["torch"] for found in graphs.values())
    beside = said["workspace"] + said["pictures"] + said["cublas"]
    out: list[tuple[str, float, float | None]] = [
        ("weights (allocated)", said["weights"], weights["allocated"]),
        ("weights (reserved)", said["weights"], weights["reserved"]),
        ("KV cache, and what stays beside", said["kv"], cache["allocated"] - weights["allocated"]),
    ]
    out += [(f"moment: {name}", said[name], moments[name]) for name in MOMENTS]
    for name, found in graphs.items():
        out.append((f"{name} graphs, torch, {found['count']}", 0, found["torch"]))
        out.append((f"{name} graphs, driver, each", 0, found["driver"] / max(found["count"], 1)))
    out += [
        ("all graphs", said["graphs"], sum(f["torch"] + f["driver"] for f in graphs.values())),
        ("context at the start", said["context"], states.get("a context", end)["outside"]),
        ("context after loading", said["context"], weights["outside"]),
        (
            "outside of torch in the end",
            said["context"] + said["graphs_driver"],
            end["outside"],
        ),
        ("beside the cache, allocated", beside, end["most_allocated"] - cache["allocated"]),
        ("between tensors", said["between"], inside - end["most_allocated"] - pools),
        (
            "inside torch, at most",
            said["fixed"] - said["context"] - said["graphs_driver"] + said["kv"],
            inside,
        ),
        ("torch was told to stop at", report["torch_limit"] or 0, inside),
        ("all", said["fixed"] + said["kv"], report["most_taken"]),
    ]
    return [(name, a / MIB, None if b is None else b / MIB) for name, a, b in out]


def show(report: dict[str, Any]) -> None:
    tokens = f"{report['kv_tokens']:,} tokens ({report['kv_tokens_by_plan']:,} by the plan)"
    print(f"\n{report['format']}: {tokens}, context {report['max_model_len']:,}", end="")
    print(f", {report['max_num_seqs']} seats, {report['retries']} retries")
    print(f"| {'part, MiB':40} | predicted | measured | predicted / measured |\n|---|---|---|---|")
    for name, said, found in rows(report):
        ratio = f"{said / found:.3f}" if said and found else ""
        print(f"| {name:40} | {said:9,.1f} | {found or 0:9,.1f} | {ratio:>8} |")
    each = [found["driver"] / max(found["count"], 1) / MIB for found in report["graphs"].values()]
    driver = sum(found["driver"] for found in report["graphs"].values())
    print(
        f"planning/driver.py: context at least {(report['states']['in the end']['outside'] - driver) / MIB:,.0f} MiB",
        end="",
    )
    print(f", GRAPH_DRIVER at least {max(each, default=0):.2f} MiB")
    for line in wrong(report):
        print(f"FAILED: {line}")
    cap = report["gpu_memory"]
    *_, (_, said, found) = rows(report)
    if cap and found:
        cap /= MIB
        print(f"of the cap of {cap:,.0f} MiB: predicted {said / cap:.2%}, taken {found / cap:.2%}", end="; ")
        print(f"the prediction is {said / found - 1:+.2%} of what was taken")


def wrong(report: dict[str, Any]) -> list[str]:
    """What must not be: loads that failed, memory that torch had to get back first, more than the cap."""
    lines = [f"{row['load']}: {row['error']}" for row in report["loads"] if row["error"]]
    if report["retries"]:
        lines.append(f"torch had to give memory back {report['retries']} times")
    *_, (_, _, taken) = rows(report)
    if report["gpu_memory"] and taken and taken * MIB > report["gpu_memory"]:
        lines.append(f"{taken:,.0f} MiB were taken, of {report['gpu_memory'] / MIB:,.0f}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default="bf16,int4")
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--batch-length", type=int, default=2048)
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        report = Run(args, args.one).go()
        args.json.write_text(json.dumps(report))
        return 0
    reports = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in args.formats.split(","):
            print(f"{kind}:", flush=True)
            file = (args.json or Path(temporary) / "plan.json").with_suffix(f".{kind}.json")
            command = [sys.executable, __file__, *sys.argv[1:], "--one", kind, "--json", str(file)]
            done = subprocess.run(command, env=os.environ, check=False)
            if done.returncode or not file.exists():
                print(f"{kind}: the process ended with {done.returncode}")
                continue
            reports.append(json.loads(file.read_text()))
            show(reports[-1])
            if args.json:
                args.json.write_text(json.dumps(reports, indent=1))
    whole = len(reports) == len(args.formats.split(","))
    return 0 if whole and not any(wrong(report) for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
