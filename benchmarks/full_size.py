"""The full-size model with random weights: memory, start, first tokens, decode and beam steps.

usage: python benchmarks/full_size.py [--int4] [--quick] [--json OUT] [--gpu-memory-utilization 0.9]   (needs CUDA)

Weights are made up on the device, sizes are those of MiniCPM-V 2.6 (8.1 B). Times are medians of three, in
milliseconds or tokens a second; memory is what torch's allocator holds after loading, before the KV cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import huoyan
from device_time import need_cuda
from huoyan import LLM, Picture, SamplingParams
from huoyan.engine import engine as engine_module

CONFIG = {
    "model_type": "minicpmv", "architectures": ["MiniCPMV"], "version": 2.6, "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 151666, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "query_num": 64, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "drop_vision_last_layer": False,
    "vision_config": {
        "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_attention_heads": 16,
        "num_hidden_layers": 27, "patch_size": 14,
    },
}  # fmt: skip


def write_folder(folder: Path, int4: bool) -> Path:
    """The embedded model's tokenizer and templates with the full sizes, and no weights."""
    tiny = Path(huoyan.__file__).parent / "tiny" / "checkpoint"
    folder.mkdir(parents=True)
    for file in tiny.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, folder)
    rules = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**rules, "scale_resolution": 448}))
    changes = {}
    if int4:
        awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
        changes = {"torch_dtype": "float16", "quantization_config": awq}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def median_ms(run, repeats: int = 3) -> float:
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append((time.perf_counter() - begun) * 1000)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--int4", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer rows")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    args = parser.parse_args()
    need_cuda()
    memory = {}
    original = engine_module.size_cache

    def remember(*arguments):
        torch.cuda.synchronize()
        memory["loaded_gib"] = torch.cuda.memory_allocated() / 2**30
        return original(*arguments)

    engine_module.size_cache = remember
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(Path(temporary) / "model", args.int4)
        begun = time.perf_counter()
        llm = LLM(
            str(folder), load_format="dummy", max_model_len=8192, enable_prefix_caching=False,
            gpu_memory_utilization=args.gpu_memory_utilization, enforce_eager=args.enforce_eager,
        )  # fmt: skip
        results: dict[str, float] = {"ready_s": time.perf_counter() - begun, **memory}
    engine = llm._runtime.backend
    results["kv_tokens"] = engine.size.num_blocks * engine.config.block_size
    print(results, flush=True)
    rng = np.random.default_rng(0)

    def picture(width: int, height: int) -> Picture:
        small = Picture(rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8))
        return Picture(np.asarray(small.to_pil().resize((width, height))))

    def ids(count: int) -> list[int]:
        return rng.integers(0, 255, count).tolist()

    def tokens(count: int, **more) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **more)

    def ask(pictures: list[Picture], params: SamplingParams):
        parts = [{"type": "image", "image": p} for p in pictures] + [{"type": "text", "text": "hello"}]
        return llm.chat([{"role": "user", "content": parts}], params, use_tqdm=False)

    def decode_ms(prompts: list[list[int]], count: int) -> float:
        begun = time.perf_counter()
        llm.generate(prompts, tokens(count), use_tqdm=False)
        return (time.perf_counter() - begun) * 1000

    def report(name: str, value: float) -> None:
        results[name] = value
        print(f"{name:32} {value:10.2f}", flush=True)

    answer = ask([picture(1344, 896)], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0]
    assert len(answer.outputs[0].token_ids) == 8, answer
    report("text512_ttft_ms", median_ms(lambda: llm.generate([ids(512)], tokens(1), use_tqdm=False)))
    for width, height in ((448, 448), (1344, 896), (1344, 1344)):
        report(f"image_{width}x{height}_ttft_ms", median_ms(lambda: ask([picture(width, height)], tokens(1))))  # noqa: B023
    if not args.quick:
        report(
            "four_images_1344x896_ttft_ms",
            median_ms(lambda: ask([picture(1344, 896) for _ in range(4)], tokens(1))),
        )
    for batch in (1, 8) if args.quick else (1, 8, 32, 64, 128):
        prompts = [ids(256) for _ in range(batch)]
        decode_ms(prompts, 72)  # graphs of the sizes that pass on the way are captured
        short, long = (min(decode_ms(prompts, n) for _ in range(2)) for n in (8, 72))
        report(f"decode_tok_s_b{batch}", batch * 64 / (long - short) * 1000)
    beams = {"use_beam_search": True, "best_of": 3}
    pic = picture(1344, 896)
    short, long = (median_ms(lambda n=n: ask([pic], tokens(n, **beams)), repeats=1) for n in (4, 36))
    report("beam3_step_ms", (long - short) / 32)
    results["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(f"peak memory {results['peak_gib']:.2f} GiB")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
