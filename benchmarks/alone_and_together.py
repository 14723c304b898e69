"""Whether a request gets the same greedy answer alone and in a batch of 64, and where it parts if not.

usage: python benchmarks/alone_and_together.py [--model tiny] [--full-size [--int4]] [--requests 64] [--tokens 64]

With the embedded model the requests are about its own pictures; with `--full-size` (needs CUDA) they are random words
for random weights of the published sizes, whose likeliest tokens are often close. Where two answers part, the distance
of the two tokens' log-probabilities is told: what rounding decides is a tie.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

import huoyan
from device_time import need_cuda
from huoyan import LLM, SamplingParams

QUESTIONS = (
    "请描述这张图片", "Describe this picture.", "What color is the house?", "How many birds are there?",
    "What does the sign say?", "有几棵树？", "What is in the picture?", "Where is the sun?",
)  # fmt: skip


def asked_of_tiny(count: int) -> list:
    """Chats about the embedded pictures, each question in as many variants as are needed."""
    media = Path(huoyan.__file__).parent / "tiny" / "media"
    pictures = sorted(media.glob("*.jpg"))
    return [
        [
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": str(pictures[i % len(pictures)])}},
                {"type": "text", "text": QUESTIONS[i // len(pictures) % len(QUESTIONS)]},
            ]}
        ]
        for i in range(count)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--int4", action="store_true")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    params = SamplingParams(
        temperature=0, max_tokens=args.tokens, ignore_eos=True, logprobs=5, detokenize=False
    )
    with tempfile.TemporaryDirectory() as temporary:
        if args.full_size:
            need_cuda()
            from full_size import write_folder

            folder = write_folder(Path(temporary) / "model", args.int4)
            llm = LLM(str(folder), load_format="dummy", max_model_len=4096, enable_prefix_caching=False)
            noise = np.random.default_rng(0)
            asked = [
                noise.integers(0, 255, int(noise.integers(20, 400))).tolist() for _ in range(args.requests)
            ]

            def run(some):
                return llm.generate(some, params, use_tqdm=False)
        else:
            llm = LLM(args.model, enable_prefix_caching=False, max_num_seqs=args.requests)
            asked = asked_of_tiny(args.requests)

            def run(some):
                return llm.chat(some, params, use_tqdm=False)

        alone = [run([one])[0].outputs[0] for one in asked]
        together = [output.outputs[0] for output in run(asked)]
    equal, parted = 0, []
    for a, b in zip(alone, together, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y), None)
        if at is None:
            equal += 1
            continue
        entry = a.logprobs[at]
        other = entry.get(b.token_ids[at])
        distance = float("inf") if other is None else entry[a.token_ids[at]].logprob - other.logprob
        parted.append((at, distance))
    print(f"{equal} of {len(asked)} answers of {args.tokens} tokens are equal alone and together")
    if parted:
        distances = sorted(distance for _, distance in parted)
        middle = len(parted) // 2
        print(
            f"{len(parted)} part, after {sorted(at for at, _ in parted)[middle]} tokens (median), where the two tokens "
            f"are {distances[middle]:.4f} apart (median), {distances[-1]:.4f} at most (inf: the other is none of the "
            "five likeliest)"
        )


if __name__ == "__main__":
    main()
