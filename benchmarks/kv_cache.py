"""What an 8-bit KV cache costs: error of attention, answers of the embedded model, time of a step on this machine.

    python benchmarks/kv_cache.py [--examples 6] [--only errors,answers,steps]

Errors are of one head of 128 over 1000 keys, in three kinds of numbers: normal ones; keys with three channels that lie
far out, as the biases of Qwen2's keys make them; and keys with a bias in every channel. Positions are rotated in.
Questions are those of int4_quality.py. Times of steps are of the processor: run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / "benchmarks"), str(_ROOT / "training"), str(_ROOT / "src")]

DTYPES = ("auto", "int8", "fp8", "fp8_e5m2")
SIZES = ((128, "one scale a head"), (64, "one for 64"), (32, "one for 32"), (16, "one for 16"))


def errors() -> None:
    import torch

    from huoyan.layers.kv_numbers import STORED_AS, dequantize, quantize
    from huoyan.layers.rope import RotaryTable, apply_rope

    torch.manual_seed(0)
    dim, length = 128, 1000
    cos, sin = RotaryTable(dim, 1e6, length).lookup(torch.arange(length))
    far = torch.zeros(dim)
    far[[60, 61, 124]] = torch.tensor([80.0, -40.0, 60.0])
    few = torch.ones(dim)
    few[[60, 61, 124]] = 0.05
    kinds = {
        "normal": (torch.zeros(dim), 1.0),
        "three far channels": (far, few),
        "biases": (3 * torch.randn(dim), 1.0),
    }
    print("relative error of attention's result:")
    for kind, (bias, factor) in kinds.items():
        k = apply_rope((torch.randn(length, dim) + bias)[:, None], cos, sin)[:, 0]
        v, q = torch.randn(length, dim), 1.5 * torch.randn(16, dim) * factor

        def attend(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor = q) -> torch.Tensor:
            return ((q @ k.T) * dim**-0.5).softmax(-1) @ v

        exact = attend(k, v)
        results = {"bfloat16": attend(k.bfloat16().float(), v.bfloat16().float())}
        for name, dtype in STORED_AS.items():
            for group, label in SIZES:
                near = [dequantize(*quantize(x, dtype, group), torch.float32) for x in (k, v)]
                results[f"{name}, {label}"] = attend(*near)
        for name, got in results.items():
            print(f"  {kind:18}  {name:28} {float((got - exact).norm() / exact.norm()):.4f}", flush=True)


def answers(examples: int) -> None:
    from huoyan import LLM, Picture, SamplingParams
    from int4_quality import questions
    from tiny_trainer.scoring import score

    asked = questions(examples, 0)
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": Picture(p)} for p in a.pictures),
                    {"type": "text", "text": a.question},
                ],
            }
        ]
        for a in asked
    ]
    exact: list[str] = []
    for name in DTYPES:
        with LLM("tiny", device="cpu", max_model_len=2048, max_num_seqs=32, kv_cache_dtype=name) as llm:
            outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=96), use_tqdm=False)
        texts = [output.outputs[0].text for output in outputs]
        exact = exact or texts
        right = [score(a.task, a.language, t, a.reference) for a, t in zip(asked, texts, strict=True)]
        same = sum(a == b for a, b in zip(texts, exact, strict=True))
        print(
            f"tiny, {name:9} {same} of {len(asked)} answers as auto's to the letter; "
            f"score {100 * statistics.mean(right):.1f}",
            flush=True,
        )


def steps(repeat: int) -> None:
    import torch

    from huoyan import SamplingParams
    from huoyan.engine.config import EngineConfig
    from huoyan.engine.engine import Engine
    from huoyan.engine.request import EngineRequest
    from huoyan.models.config import ModelConfig, TextConfig, VisionConfig
    from huoyan.models.weights import build_model
    from huoyan.prompt.types import EncodedPrompt

    text = TextConfig(1024, 2816, 8, 8, 2, 4096, 4096, head_dim=128)
    model = build_model(
        ModelConfig("2.6", text, VisionConfig(32, 48, 1, 2, 56, 14), 8, "float32"), seed=0
    ).eval()
    print(
        f"a decode step of a random model ({sum(p.numel() for p in model.parameters()) / 1e6:.0f} M), ms of processor:"
    )
    for count, context in ((1, 200), (1, 3000), (8, 1500)):
        medians = {}
        for _ in range(repeat):
            for name in DTYPES:
                engine = Engine(
                    model,
                    EngineConfig(
                        kv_cache_dtype=name, num_blocks=1200, max_num_seqs=8, max_num_batched_tokens=4096
                    ),
                )
                params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
                for i in range(count):
                    ids = torch.randint(0, 4096, (context,)).tolist()
                    engine.add_request(EngineRequest(str(i), EncodedPrompt(ids, ()), params))
                times = []
                while engine.has_unfinished_requests():
                    begun = time.process_time()
                    engine.step()
                    times.append(time.process_time() - begun)
                medians.setdefault(name, []).append(1000 * statistics.median(times[-20:]))
        row = ", ".join(f"{name} {statistics.median(v):.1f}" for name, v in medians.items())
        print(f"  {count} sequence(s) of {context} tokens: {row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=6, help="drawings of each family of questions")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="errors,answers,steps")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if "errors" in wanted:
        errors()
    if "answers" in wanted:
        answers(args.examples)
    if "steps" in wanted:
        steps(args.repeat)


if __name__ == "__main__":
    main()
