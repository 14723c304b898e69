"""What going through our backend costs against calling vLLM itself: one engine of vLLM, asked in both ways by turns.

usage: python benchmarks/vllm_overhead.py [--model tiny] [--rows words,small,large] [--rounds 7] [--seconds 120]

Rows: `words`, and a picture for each request, of 448 x 448 (`small`) or 1344 x 896 (`large`). Runs where vLLM is
installed, on a CPU or a GPU. Each row is warmed up in both ways with as many requests as are counted. A round asks
for the same number of new requests (no text and no picture twice, so that no cache helps) in one way, then in the
other; who is first alternates, and the rows take turns, so that each has its share where `--seconds` (counted
from the warm-up on) end the run. Prints each round, then tokens a second of both, the ratio ours / direct as the
median of the rounds, the middle half of them, and their range; and the processor time of this process, which
other programs on the machine disturb less than the clock. Direct means `vllm.LLM.generate` with prompts and PIL
pictures; ours is `huoyan.LLM.generate` over the same engine.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

PICTURE = "(<image>./</image>)"
ROWS = {"words": None, "small": (448, 448), "large": (1344, 896)}
_counter = itertools.count()


@dataclass(frozen=True)
class Run:
    """One way of asking, once."""

    speed: float
    """Tokens a second."""
    host: float
    """Seconds of processor time in this process; vLLM's engine has its own."""


@dataclass
class Row:
    """Paired runs of one kind of work."""

    direct: list[Run] = field(default_factory=list)
    ours: list[Run] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        ratios = sorted(
            mine.speed / theirs.speed for mine, theirs in zip(self.ours, self.direct, strict=True)
        )
        quarter = len(ratios) // 4
        return {
            "rounds": len(ratios),
            "direct": statistics.median(run.speed for run in self.direct),
            "ours": statistics.median(run.speed for run in self.ours),
            "ratio": statistics.median(ratios),
            "middle_half": [ratios[quarter], ratios[-1 - quarter]],
            "range": [ratios[0], ratios[-1]],
            "host_ms": {
                "direct": 1000 * statistics.median(run.host for run in self.direct),
                "ours": 1000 * statistics.median(run.host for run in self.ours),
            },
        }


def requests(count: int, size: tuple[int, int] | None) -> list[dict[str, Any]]:
    """New ones at every call."""
    found: list[dict[str, Any]] = []
    for _ in range(count):
        number = next(_counter)
        text = f"{'' if size is None else PICTURE}\nDescribe number {number}, please."
        prompt: dict[str, Any] = {"prompt": f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"}
        if size is not None:
            rng = np.random.default_rng(number)
            small = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            prompt["multi_modal_data"] = {"image": Image.fromarray(small).resize(size)}
        found.append(prompt)
    return found


def timed(run: Callable[[Any], Any], prompts: list[dict[str, Any]], tokens: int) -> Run:
    gc.collect()
    begun, host = time.perf_counter(), time.process_time()
    outputs = run(prompts)
    seconds, host = time.perf_counter() - begun, time.process_time() - host
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert made == len(prompts) * tokens, "every answer must have its full length"
    return Run(made / seconds, host)


def measured(
    ways: dict[str, Callable[[Any], Any]],
    names: Sequence[str],
    given: argparse.Namespace,
    say: Callable[[str], None],
) -> dict[str, Row]:
    """The rounds that fit into the time. `ways` are `direct` and `ours`."""
    ends = time.monotonic() + given.seconds
    rows = {name: Row() for name in names}
    for name in names:
        begun = time.perf_counter()
        for run in ways.values():
            timed(run, requests(given.requests, ROWS[name]), given.tokens)
        say(f"{name}: warmed up in {time.perf_counter() - begun:.1f} s")
    lasted = dict.fromkeys(names, 0.0)
    for number, name in itertools.product(range(given.rounds), names):
        if time.monotonic() + lasted[name] > ends:
            if len(rows[name].ours) == number:
                say(f"{name}: no time for round {number + 1}")
            continue
        begun = time.monotonic()
        order = list(ways) if number % 2 == 0 else list(reversed(ways))
        found = {way: timed(ways[way], requests(given.requests, ROWS[name]), given.tokens) for way in order}
        rows[name].direct.append(found["direct"])
        rows[name].ours.append(found["ours"])
        lasted[name] = time.monotonic() - begun
        ratio = found["ours"].speed / found["direct"].speed
        say(f"{name}: round {number + 1}, ours / direct {ratio:.3f} ({lasted[name]:.1f} s)")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument(
        "--json", action="store_true", help="the summary as JSON; rounds go to standard error"
    )
    given = parser.parse_args()
    names = given.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--rows {','.join(unknown)}: there are {', '.join(ROWS)}")

    def say(line: str) -> None:
        print(line, file=sys.stderr if given.json else sys.stdout, flush=True)

    begun = time.perf_counter()
    ways, close = opened(given)
    say(f"loaded in {time.perf_counter() - begun:.0f} s")
    rows = measured(ways, names, given, say)
    results = {name: row.summary() for name, row in rows.items() if row.ours}
    if given.json:
        print(json.dumps(results))
    else:
        for name, found in results.items():
            (low, high), (lowest, highest), host = found["middle_half"], found["range"], found["host_ms"]
            print(
                f"{name}: direct {found['direct']:.0f} tokens/s, ours {found['ours']:.0f} tokens/s, ours / direct "
                f"{found['ratio']:.3f} (middle half {low:.3f} to {high:.3f}, all {lowest:.3f} to {highest:.3f}, "
                f"{found['rounds']} rounds); host {host['direct']:.0f} and {host['ours']:.0f} ms",
                flush=True,
            )
    close()


def opened(given: argparse.Namespace) -> tuple[dict[str, Callable[[Any], Any]], Callable[[], None]]:
    """Both ways of asking one engine, and how to end it."""
    from huoyan import LLM, SamplingParams
    from huoyan.api.frontend import open_frontend
    from huoyan.api.options import parse_options
    from huoyan.api.runtime import Runtime
    from huoyan.backends.vllm.settings import engine_arguments, prepare_environment
    from huoyan.backends.vllm.start import over_engine
    from huoyan.models.checkpoint import open_checkpoint
    from huoyan.models.hub import resolve_model

    options = parse_options(
        given.model,
        {
            "engine": "vllm",
            "max_model_len": 4096,
            "max_num_seqs": given.max_num_seqs,
            "enforce_eager": given.enforce_eager,
        },
    )
    folder = resolve_model(given.model)
    checkpoint = open_checkpoint(folder)
    prepare_environment()
    import vllm
    from vllm.platforms import current_platform

    direct = vllm.LLM(**engine_arguments(options, folder, checkpoint, current_platform.device_type))
    frontend = open_frontend(folder, folder, options)
    backend = over_engine(direct.llm_engine, folder, checkpoint.config, frontend, given.max_num_seqs)
    ours = LLM.from_runtime(Runtime(backend, frontend, folder, options))
    asked = {
        "temperature": 0.8,
        "max_tokens": given.tokens,
        "min_tokens": given.tokens,
        "ignore_eos": True,
    }
    theirs, mine = vllm.SamplingParams(**asked), SamplingParams(**asked)
    ways: dict[str, Callable[[Any], Any]] = {
        "direct": lambda prompts: direct.generate(prompts, theirs, use_tqdm=False),
        "ours": lambda prompts: ours.generate(prompts, mine, use_tqdm=False, raise_on_error=True),
    }
    return ways, ours.close


if __name__ == "__main__":
    # vLLM starts processes that import this file.
    main()
