"""What company costs and brings on this machine, with the embedded model.

usage: python benchmarks/company.py [--model tiny] [--requests 64] [--repeat 3]

Prints the time of mixed requests (one picture, two pictures, text; greedy and sampled) run together and one by
one, whether the greedy answers are equal, and the time of a step of a beam search of three against a greedy one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

import huoyan
from huoyan import LLM, Picture, SamplingParams

MEDIA = Path(huoyan.__file__).parent / "tiny" / "media"
QUESTIONS = [
    "请描述这张图片",
    "Describe this picture.",
    "What colour is it?",
    "图中有什么?",
    "How many things are there?",
]


def mixed(count: int) -> tuple[list, list[SamplingParams]]:
    """Conversations of several kinds; every picture is another one, so that no cache helps."""
    rng = np.random.default_rng(0)
    base = [Picture.open(MEDIA / name).pixels for name in ("airplane.jpg", "street.jpg", "stars.jpg")]
    conversations, params = [], []
    for i in range(count):
        parts: list[dict] = [
            {"type": "image", "image": picture(rng, base, i)} for _ in range((1, 1, 0, 2)[i % 4])
        ]
        parts.append({"type": "text", "text": QUESTIONS[i % len(QUESTIONS)]})
        conversations.append([{"role": "user", "content": parts}])
        sampled = i % 5 == 4
        params.append(
            SamplingParams(
                temperature=0.8 if sampled else 0.0,
                seed=i,
                max_tokens=48,
                min_tokens=32,
                top_k=50 if sampled else -1,
            )
        )
    return conversations, params


def timed(run) -> tuple[float, float]:
    """(seconds by the clock, seconds of processor time)."""
    begun, busy = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - begun, time.process_time() - busy


def picture(rng: np.random.Generator, base: list[np.ndarray], mark: int) -> Picture:
    """One of the base pictures with another corner, so that no cache knows it."""
    pixels = base[int(rng.integers(len(base)))].copy()
    pixels[: 2 + mark % 5, :3] = rng.integers(0, 255, 3)
    return Picture(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    # No caches: the second way must not profit from the first.
    llm = LLM(args.model, enable_prefix_caching=False, max_model_len=2048)
    conversations, params = mixed(args.requests)
    llm.chat(conversations[:4], params[:4], use_tqdm=False)
    ratios = []
    for _ in range(args.repeat):
        alone, together = [], []

        def one_by_one(out=alone) -> None:
            for c, p in zip(conversations, params, strict=True):
                out += llm.chat([c], [p], use_tqdm=False)

        def at_once(out=together) -> None:
            out += llm.chat(conversations, params, use_tqdm=False)

        times = []
        for run in (one_by_one, at_once):
            llm._runtime.backend.pictures.clear()
            times.append(timed(run))
        greedy = [i for i, p in enumerate(params) if p.temperature == 0]
        same = sum(alone[i].outputs[0].token_ids == together[i].outputs[0].token_ids for i in greedy)
        (wall_a, cpu_a), (wall_b, cpu_b) = times
        ratios.append((wall_a / wall_b, cpu_a / cpu_b))
        print(
            f"{args.requests} requests: one by one {wall_a:.2f} s ({cpu_a:.2f} s of processor), together "
            f"{wall_b:.2f} s ({cpu_b:.2f} s); {same} of {len(greedy)} greedy answers equal",
            flush=True,
        )
    wall, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"median: {wall:.1f} times faster by the clock, {cpu:.1f} times less processor time")

    question = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": MEDIA / "airplane.jpg"},
                {"type": "text", "text": QUESTIONS[0]},
            ],
        }
    ]
    greedy_params = {n: SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (8, 136)}
    beam_params = {
        n: SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, use_beam_search=True, best_of=3)
        for n in (8, 136)
    }
    steps: dict[str, list[tuple[float, float]]] = {"greedy": [], "beam 3": []}
    for _ in range(2 * args.repeat + 1):
        for name, by_length in (("greedy", greedy_params), ("beam 3", beam_params)):
            short, long = (
                timed(lambda p=p: llm.chat(question, p, use_tqdm=False)) for p in by_length.values()
            )
            steps[name].append(tuple((b - a) / 128 * 1000 for a, b in zip(short, long, strict=True)))
    for which, unit in ((0, "by the clock"), (1, "of processor")):
        medians = {name: statistics.median(v[which] for v in values) for name, values in steps.items()}
        print(
            f"a step, ms {unit}: greedy {medians['greedy']:.2f}, beam 3 {medians['beam 3']:.2f}, "
            f"ratio {medians['beam 3'] / medians['greedy']:.2f}"
        )


if __name__ == "__main__":
    main()
