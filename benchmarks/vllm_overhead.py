"""What going through our backend costs against calling vLLM itself: one engine of vLLM, asked in both ways by turns.

usage: python benchmarks/vllm_overhead.py [--model tiny] [--requests 32] [--tokens 64] [--rounds 5]

Runs where vLLM is installed, on a CPU or a GPU. Each round asks for the same number of new requests (no text and
no picture twice, so that no cache helps) first in one way, then in the other, and the order changes with the
round. Prints tokens a second of both, and the ratio ours / direct: the median of the rounds, and their range.
Direct means `vllm.LLM.generate` with prompts and PIL pictures; ours is `huoyan.LLM.generate` over the same engine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from typing import Any

import numpy as np
from PIL import Image

from huoyan import LLM, SamplingParams
from huoyan.api.frontend import open_frontend
from huoyan.api.options import parse_options
from huoyan.api.runtime import Runtime
from huoyan.backends.vllm.settings import engine_arguments, prepare_environment
from huoyan.backends.vllm.start import over_engine
from huoyan.models.checkpoint import open_checkpoint
from huoyan.models.hub import resolve_model

PICTURE = "(<image>./</image>)"
WORKS = {
    "words": None,
    "a picture of 448 x 448": (448, 448),
    "a picture of 1344 x 896": (1344, 896),
}
_counter = itertools.count()


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


def timed(run: Any, prompts: list[dict[str, Any]], tokens: int) -> float:
    """Tokens a second."""
    begun = time.perf_counter()
    outputs = run(prompts)
    seconds = time.perf_counter() - begun
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert made == len(prompts) * tokens, "every answer must have its full length"
    return made / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

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
    model = open_checkpoint(folder).config
    prepare_environment()
    import vllm
    from vllm.platforms import current_platform

    direct = vllm.LLM(**engine_arguments(options, folder, folder, model, current_platform.device_type))
    frontend = open_frontend(folder, folder, options)
    backend = over_engine(direct.llm_engine, folder, model, frontend, given.max_num_seqs)
    ours = LLM.from_runtime(Runtime(backend, frontend, folder, options))
    theirs = vllm.SamplingParams(
        temperature=0.8, max_tokens=given.tokens, min_tokens=given.tokens, ignore_eos=True
    )
    mine = SamplingParams(temperature=0.8, max_tokens=given.tokens, min_tokens=given.tokens, ignore_eos=True)
    ways = {
        "direct": lambda prompts: direct.generate(prompts, theirs, use_tqdm=False),
        "ours": lambda prompts: ours.generate(prompts, mine, use_tqdm=False, raise_on_error=True),
    }
    results = {}
    for work, size in WORKS.items():
        for way in ways.values():
            way(requests(4, size))
        rounds = []
        for number in range(given.rounds):
            order = list(ways) if number % 2 == 0 else list(reversed(ways))
            speed = {name: timed(ways[name], requests(given.requests, size), given.tokens) for name in order}
            rounds.append(speed)
        ratios = [speed["ours"] / speed["direct"] for speed in rounds]
        results[work] = {
            "direct": statistics.median(speed["direct"] for speed in rounds),
            "ours": statistics.median(speed["ours"] for speed in rounds),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
        if not given.json:
            found = results[work]
            print(
                f"{work}: direct {found['direct']:.0f} tokens/s, ours {found['ours']:.0f} tokens/s, "
                f"ours / direct {found['ratio']:.3f} ({found['lowest']:.3f} to {found['highest']:.3f})",
                flush=True,
            )
    if given.json:
        print(json.dumps(results))
    ours.close()


if __name__ == "__main__":
    # vLLM starts processes that import this file.
    main()
