"""What prompt-lookup speculation brings and costs on this machine.

    python benchmarks/speculation.py [--tokens 5] [--repeat 3] [--layers 8] [--only scripted,tiny]

Scripted: a decoder of random weights computes every step, but says what a script has it say, so that the answer is a
text of a known kind: a passage of its prompt copied; rows of a table whose keys repeat; prose that repeats
nothing but language; random tokens. Guesses, verification and rejection are the product's.

tiny: the embedded model's own greedy answers about its pictures, as they come, and made to go on after their end.

Times are of the processor: with OMP_NUM_THREADS=1 what else runs on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / "src")]

ANSWER = 240


def scripts() -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and answer by kind, as ids of the embedded model's tokenizer."""
    import huoyan
    from huoyan.prompt.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(Path(huoyan.__file__).parent / "tiny" / "checkpoint")
    rng = random.Random(0)
    prose = tokenizer.encode_plain((_ROOT / "docs" / "media.md").read_text(encoding="utf-8"))
    other = tokenizer.encode_plain((_ROOT / "docs" / "quantization.md").read_text(encoding="utf-8"))
    table = "".join(
        f'{{"invoice": {rng.randrange(10_000)}, "amount": {rng.randrange(900)}.{rng.randrange(10)}, '
        f'"currency": "EUR", "paid": {rng.choice(["true", "false"])}}}\n'
        for _ in range(40)
    )
    noise = [rng.randrange(900) for _ in range(400 + ANSWER)]
    return {
        "copy of the prompt": (prose[:400], prose[100 : 100 + ANSWER]),
        "rows of a table": (other[:400], tokenizer.encode_plain(table)[:ANSWER]),
        "prose": (prose[:400], other[600 : 600 + ANSWER]),
        "random tokens": (noise[:400], noise[400:]),
    }


def scripted(tokens: int, longest: int, shortest: int, repeat: int, layers: int) -> None:
    from huoyan import SamplingParams
    from huoyan.engine.answer import ChosenToken
    from huoyan.engine.chooser import Chooser
    from huoyan.engine.config import EngineConfig
    from huoyan.engine.engine import Engine
    from huoyan.engine.request import EngineRequest
    from huoyan.engine.speculation import NgramSpeculation
    from huoyan.models.config import ModelConfig, TextConfig, VisionConfig
    from huoyan.models.weights import build_model
    from huoyan.prompt.types import EncodedPrompt

    class Scripted(Chooser):
        script: list[int]

        def choose(self, logits: Any, rows: Any, before: Any = None, drafts: Any = None) -> Any:
            choice = super().choose(logits, rows, before, drafts)
            chosen = choice.read()
            for group, tokens in chosen.items():
                said = len(group.sequences[0].output_ids)
                chosen[group] = [
                    ChosenToken(self.script[min(said + i, ANSWER - 1)]) for i in range(len(tokens))
                ]
            choice.read = lambda: chosen
            return choice

    text = TextConfig(1024, 4096, layers, 8, 2, 1024, 4096, head_dim=128)
    model = build_model(
        ModelConfig("2.6", text, VisionConfig(32, 48, 1, 2, 56, 14), 8, "float32"), seed=0
    ).eval()
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M random weights, float32; "
        f"{tokens} tokens at once, {shortest} to {longest} must agree:"
    )
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    for kind, (prompt, answer) in scripts().items():
        ratios, plain_ms, stats = [], [], None
        for _ in range(repeat):
            seconds = []
            for speculation in (None, NgramSpeculation(tokens, longest, shortest)):
                engine = Engine(model, EngineConfig(num_blocks=80, max_num_seqs=8, speculation=speculation))
                chooser = Scripted(0, 1024)
                chooser.script = answer
                engine._chooser = chooser
                engine.add_request(EngineRequest("r", EncodedPrompt(prompt, ()), params))
                engine.step()
                begun = time.process_time()
                while engine.has_unfinished_requests():
                    (output,) = engine.step()
                seconds.append(time.process_time() - begun)
                assert output.outputs[0].token_ids == answer
                stats = engine.stats()
            ratios.append(seconds[0] / seconds[1])
            plain_ms.append(1000 * seconds[0] / (ANSWER - 1))
        assert stats is not None
        print(
            f"  {kind:20} {(ANSWER - 1) / (stats.steps - 1):.2f} tokens a step, "
            f"{stats.accepted_tokens} of {stats.draft_tokens} guesses right, "
            f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}; "
            f"a plain step {statistics.median(plain_ms):.1f} ms of processor)",
            flush=True,
        )


def tiny(tokens: int, longest: int, shortest: int, repeat: int) -> None:
    import huoyan
    from huoyan import LLM, SamplingParams

    media = Path(huoyan.__file__).parent / "tiny" / "media"
    names = ("airplane.jpg", "street.jpg", "stars.jpg", "sign.jpg")
    questions = (
        "Describe this picture.",
        "请描述这张图片",
        "How many things are there?",
        "What does the sign say?",
    )
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": media / name}, {"type": "text", "text": question}],
            }
        ]
        for name in names
        for question in questions
    ]
    config = {
        "method": "ngram",
        "num_speculative_tokens": tokens,
        "prompt_lookup_max": longest,
        "prompt_lookup_min": shortest,
    }
    models = [LLM("tiny", device="cpu", max_model_len=2048, speculative_config=c) for c in (None, config)]
    for label, params in (
        ("as they come", SamplingParams(temperature=0, max_tokens=96)),
        ("128 tokens each", SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)),
        (
            "128 tokens each, temperature 1, seeds",
            SamplingParams(temperature=1, seed=1, max_tokens=128, ignore_eos=True),
        ),
    ):
        ratios = []
        before = models[1]._runtime.backend.stats()
        for _ in range(repeat):
            seconds, said = [], []
            for llm in models:
                begun = time.process_time()
                outputs = [llm.chat(c, params, use_tqdm=False)[0] for c in conversations]
                seconds.append(time.process_time() - begun)
                said.append([output.outputs[0].token_ids for output in outputs])
            ratios.append(seconds[0] / seconds[1])
        after = models[1]._runtime.backend.stats()
        same = sum(a == b for a, b in zip(*said, strict=True))
        drafted, right = (getattr(after, n) - getattr(before, n) for n in ("draft_tokens", "accepted_tokens"))
        print(
            f"tiny, {label}: {same} of {len(conversations)} answers equal; {right} of {drafted} guesses right, "
            f"{(after.generated_tokens - before.generated_tokens) / (after.steps - before.steps):.2f} tokens a step, "
            f"{statistics.median(ratios):.2f} times as fast, pictures and prompts included",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--longest", type=int, default=4)
    parser.add_argument("--shortest", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default="scripted,tiny")
    args = parser.parse_args()
    lookup = (args.tokens, args.longest, args.shortest, args.repeat)
    if "scripted" in args.only:
        scripted(*lookup, args.layers)
    if "tiny" in args.only:
        tiny(*lookup)


if __name__ == "__main__":
    main()
