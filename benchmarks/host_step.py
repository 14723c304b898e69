"""The host's part of a decode step: everything but the model, whose logits are there at once.

The real engine, scheduler, batches, chooser, answers, outputs and driver; in place of the decode graph stands a table
of logits, so that what is left is what the device would wait for. Printed is processor time (with --device cuda wall
time) of a step in which all sequences decode, the driver's part of it included; the parts are measured by themselves.

    .venv/bin/python benchmarks/host_step.py --sequences 1 32 128 256
    .venv/bin/python benchmarks/host_step.py --sequences 128 --kinds greedy --profile
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import pstats
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

import huoyan
from huoyan.api.driver import Job, drive
from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.request import EngineRequest
from huoyan.models.config import ModelConfig, TextConfig, VisionConfig
from huoyan.models.weights import build_model
from huoyan.prompt.processor import PromptProcessor
from huoyan.prompt.types import EncodedPrompt

if TYPE_CHECKING:
    from huoyan.engine.batch import Batch

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "detokenize": False},
    "text": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "detokenize": False},
    "top-p": {"temperature": 0.8, "top_p": 0.9, "detokenize": False},
    "logprobs": {"temperature": 0.0, "logprobs": 3, "detokenize": False},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "detokenize": False},
}
PROMPT = 40
TOKENS = 80


class Table:
    """Stands where `DecodeGraphs` would: logits are there already."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self._logits = torch.rand(rows, vocab, device=device)

    def fits(self, batch: Batch) -> bool:
        return batch.num_decodes == len(batch.chunks)

    def run(self, batch: Batch, *late: Any) -> torch.Tensor:
        return self._logits[: len(batch.chunks)]


def make_engine(sequences: int, vocab: int, device: torch.device, tokenizer: Any) -> Engine:
    text = TextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=vocab,
        max_position_embeddings=4096,
        head_dim=16,
    )
    config = ModelConfig("2.6", text, VisionConfig(32, 48, 1, 2, 56, 14), query_num=5, dtype="float32")
    model = build_model(config, seed=0).to(device).eval()
    blocks = sequences * (-(-(PROMPT + TOKENS) // 16) + 1)
    engine = Engine(
        model,
        EngineConfig(num_blocks=blocks, max_num_seqs=sequences, max_num_batched_tokens=4096, run_ahead=True),
        tokenizer=tokenizer,
    )
    engine.runner._graphs = Table(sequences, vocab, device)  # type: ignore[assignment]
    return engine


class Bench:
    """One engine and its driver."""

    def __init__(self, engine: Engine, sequences: int, vocab: int, streamed: bool) -> None:
        self.engine = engine
        self.streamed = streamed
        self.sequences = sequences
        self.parts: dict[str, float] = {}
        self.totals: dict[str, float] = defaultdict(float)
        self.steps = 0
        self._clock = process_time if engine.model.device.type == "cpu" else perf_counter
        self._ended, self._was_full = 0.0, False
        self._vocab = vocab
        self._pool = ThreadPoolExecutor(1)
        self._ids = itertools.count()

    def run(self, tokens: int, kind: dict[str, Any]) -> None:
        """Answers of `tokens` tokens to as many prompts as there are sequences, as `LLM.generate` has them."""
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, **kind)
        names = [str(next(self._ids)) for _ in range(self.sequences)]
        jobs = [Job(name, name, params) for name in names]  # type: ignore[arg-type]
        options = SimpleNamespace(max_num_seqs=self.sequences)
        runtime = SimpleNamespace(backend=self.engine, frontend=self, options=options)
        finished = 0
        for output in drive(runtime, jobs, self._pool, streamed=self.streamed):  # type: ignore[arg-type]
            finished += output.finished
        assert finished == self.sequences

    def prepare(self, request_id: str, prompt: Any, params: SamplingParams) -> EngineRequest:
        number = int(request_id)
        ids = [(number * 7 + i * (1 + number % 5)) % self._vocab for i in range(PROMPT)]
        return EngineRequest(request_id, EncodedPrompt(ids, ()), params)

    def watch(self) -> None:
        """Measure steps from now on, where all sequences decode."""
        engine = self.engine
        plain = engine.step

        def step() -> Any:
            full = len(engine.scheduler.running) == self.sequences
            before, begun = dict(self.parts), self._clock()
            outputs = plain()
            ended = self._clock()
            if full and self._was_full:
                self.steps += 1
                self.totals["step"] += ended - begun
                self.totals["driver"] += begun - self._ended
                for name, value in self.parts.items():
                    self.totals[name] += value - before[name]
            self._ended, self._was_full = ended, full
            return outputs

        engine.step = step  # type: ignore[method-assign]

    def watch_parts(self) -> None:
        """Measure the parts of these steps, too."""
        engine = self.engine
        for name, owner, method in (
            ("schedule", engine.scheduler, "schedule"),
            ("forward", engine.runner, "forward"),
            ("launched", engine.scheduler, "launched"),
            ("choose", engine._chooser, "choose"),
            ("land", engine, "_land"),
        ):
            self._measure(name, owner, method)

    def _measure(self, name: str, owner: Any, method: str) -> None:
        plain = getattr(owner, method)
        self.parts[name] = 0.0

        def measured(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            try:
                return plain(*args, **kwargs)
            finally:
                self.parts[name] += self._clock() - start

        setattr(owner, method, measured)

    def seconds(self, kind: dict[str, Any]) -> dict[str, float]:
        """Of one step, by part."""
        self.totals.clear()
        self.steps, self._was_full = 0, False
        self.run(TOKENS, kind)
        a_step = {name: value / self.steps for name, value in self.totals.items()}
        step, driver = a_step.pop("step"), a_step.pop("driver")
        return {**a_step, "rest of step": step - sum(a_step.values()), "driver": driver}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--vocab", type=int, default=64, help="small, or the logits take the time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokenizer", type=Path, help="a checkpoint's folder; default: the embedded one's")
    parser.add_argument("--repeat", type=int, default=5, help="the least of so many is printed")
    parser.add_argument(
        "--streamed", action="store_true", help="outputs of every step, not only the last ones"
    )
    parser.add_argument("--parts", action="store_true", help="microseconds of each part, too")
    parser.add_argument("--profile", action="store_true", help="cProfile's list of a long run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiny = Path(huoyan.__file__).parent / "tiny" / "checkpoint"
    tokenizer = PromptProcessor.from_folder(args.tokenizer or tiny).tokenizer
    device = torch.device(args.device)
    print(f"{'kind':>10} {'sequences':>9} {'us a step':>9} {'us a sequence':>13}")
    for kind in args.kinds:
        for sequences in args.sequences:
            bench = Bench(
                make_engine(sequences, args.vocab, device, tokenizer), sequences, args.vocab, args.streamed
            )
            bench.run(TOKENS, KINDS[kind])
            bench.watch()
            seconds = min(sum(bench.seconds(KINDS[kind]).values()) for _ in range(args.repeat))
            print(
                f"{kind:>10} {sequences:9} {seconds * 1e6:9.0f} {seconds / sequences * 1e6:13.2f}", flush=True
            )
            if args.profile:
                profile = cProfile.Profile()
                profile.runcall(bench.run, TOKENS, KINDS[kind])
                pstats.Stats(profile).sort_stats("tottime").print_stats(45)
            if args.parts:
                bench.watch_parts()
                tries = [bench.seconds(KINDS[kind]) for _ in range(args.repeat)]
                parts = min(tries, key=lambda found: sum(found.values()))
                print(
                    "   " + ", ".join(f"{name} {value * 1e6:.0f}" for name, value in parts.items()),
                    flush=True,
                )


if __name__ == "__main__":
    main()
