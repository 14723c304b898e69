"""Seconds to quantize one decoder layer of the full-size model (random weights and activations).

usage: python benchmarks/quantize_layer.py [--device cuda] [--tokens 16384]
"""

from __future__ import annotations

import argparse
import time

import torch

from huoyan.layers.rope import RotaryTable
from huoyan.models.config import TextConfig
from huoyan.models.qwen2 import DecoderLayer
from huoyan.models.weights import fill_random
from huoyan.quantize.awq import AwqOptions, LayerInputs, quantize_layer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=16384)
    args = parser.parse_args()
    device = torch.device(args.device)
    text = TextConfig(3584, 18944, 1, 28, 4, 151666, 32768, 128)
    with torch.device("meta"):
        layer = DecoderLayer(text)
    fill_random(layer, device, torch.float16, 0)
    x = torch.randn(args.tokens, 3584, device=device, dtype=torch.float16)
    inputs = LayerInputs(x, [512] * (args.tokens // 512), RotaryTable(128, 1e6, 1024))
    ways = {
        "rtn": AwqOptions(method="rtn"),
        "awq": AwqOptions(),
        "awq compensated": AwqOptions(compensate=True),
    }
    for method, options in ways.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        quantize_layer(layer, inputs, options)
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        else:
            peak = ""
        print(f"{method}: {time.perf_counter() - begun:.2f} s for {args.tokens} tokens{peak}", flush=True)


if __name__ == "__main__":
    main()
