"""The decoder on a CPU beside llama.cpp's, with weights of the same shape: decode and prefill, and their ratios.

    python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python gguf   (outside of the repository; it compiles)
    python benchmarks/cpu_llamacpp.py write DIR [--shape 1b|tiny]         (our checkpoints: random, or the embedded)
    LLAMA/bin/python benchmarks/cpu_llamacpp.py gguf DIR                  (the same weights as GGUF)
    python benchmarks/cpu_llamacpp.py run DIR --llama LLAMA/bin/python [--rounds 5] [--threads 2]

`run` keeps one process an engine and format, asks them in turn, and prints the medians of its rounds: tokens a
second, and for each of ours the ratio to llama.cpp's in the same round. Before that it holds the greedy tokens of
the 16-bit models against each other. Prompts are random token ids; the vision side is not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / "src")]

SHAPE_1B = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 32000, "max_position_embeddings": 4096, "vision_hidden_size": 144,
    "vision_intermediate_size": 320, "vision_num_hidden_layers": 2, "vision_num_attention_heads": 2,
}  # fmt: skip
"""1.1 billion parameters in the decoder and its two tables."""
GGUF_KINDS = {"f16": 1, "q8_0": 7, "q4_0": 2, "q4_k": 15}
"""llama.cpp's numbers of file types. Its 4-bit files have an 8-bit head here, as ours with an int8 head."""
PAIRS = (("bf16", "f16"), ("float32", "f16"), ("int4", "q4_0"), ("int4", "q4_k"), ("int4+int8", "q4_0"))
"""Ours, and what of llama.cpp it is divided by."""


def write(folder: Path, shape: str) -> None:
    """`bf16` and `int4` (and `int4+int8`, with an int8 head) under `folder`."""
    from huoyan.bench.random_checkpoint import CheckpointShape, write_random_checkpoint
    from huoyan.models.hub import resolve_model
    from huoyan.quantize.calibration import CalibrationItem
    from huoyan.quantize.run import quantize

    folder.mkdir(parents=True, exist_ok=True)
    if shape == "tiny":
        (folder / "bf16").symlink_to(resolve_model("tiny"))
        group_size = 64
    else:
        write_random_checkpoint(folder / "bf16", CheckpointShape(**SHAPE_1B))
        group_size = 128
    for name, head in (("int4", "none"), ("int4+int8", "int8")):
        quantize(
            folder / "bf16", folder / name, method="rtn", group_size=group_size, quantize_head=head,
            device="cpu", calibration=[CalibrationItem("hello")],
        )  # fmt: skip


def _raw_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor of a 16-bit checkpoint as float32, without torch."""
    import numpy as np

    from huoyan.models.safetensors_header import read_header

    for file in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(file, np.uint8, "r")
        length = int.from_bytes(raw[:8].tobytes(), "little")
        spans = json.loads(raw[8 : 8 + length].tobytes())
        for info in read_header(file):
            first, last = spans[info.name]["data_offsets"]
            data = raw[8 + length + first : 8 + length + last]
            if info.dtype == "BF16":
                value = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                value = data.view({"F16": np.float16, "F32": np.float32}[info.dtype]).astype(np.float32)
            yield info.name, value.reshape(info.shape)


_GGUF_NAMES = {
    "llm.model.embed_tokens.": "token_embd.", "llm.lm_head.": "output.", "llm.model.norm.": "output_norm.",
    "llm.model.layers.": "blk.", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(folder: Path) -> None:
    """The decoder of `folder`/bf16 in each of GGUF_KINDS. Runs in llama.cpp's environment."""
    import ctypes

    import gguf
    import llama_cpp
    import numpy as np

    config = json.loads((folder / "bf16" / "config.json").read_text())
    path = folder / "f16.gguf"
    out = gguf.GGUFWriter(path, "qwen2")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("none")
    out.add_file_type(GGUF_KINDS["f16"])
    for name, value in _raw_tensors(folder / "bf16"):
        if name.startswith("llm."):
            for ours, theirs in _GGUF_NAMES.items():
                name = name.replace(ours, theirs)
            out.add_tensor(name, value.astype(np.float16) if value.ndim == 2 else value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    for kind, number in GGUF_KINDS.items():
        if kind != "f16":
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype, params.pure = number, True
            params.output_tensor_type = params.token_embedding_type = 8  # GGML_TYPE_Q8_0
            failed = llama_cpp.llama_model_quantize(
                str(path).encode(), str(folder / f"{kind}.gguf").encode(), ctypes.byref(params)
            )
            if failed:
                sys.exit(f"llama.cpp cannot write {kind}")


def prompt_ids(count: int, seed: int, vocab: int) -> list[int]:
    import random

    return [random.Random(seed).randrange(min(vocab, 1000)) for _ in range(count)]


Run = Callable[[list[int], int], tuple[list[int], float, float]]
"""Prompt ids and tokens to decode -> (greedy ids, seconds to the first, seconds for the others)."""


def ours(folder: Path, kind: str, threads: int) -> Run:
    import torch

    from huoyan import LLM, SamplingParams

    torch.set_num_threads(threads)
    if kind == "float32":
        folder, dtype = folder / "bf16", "float32"
    else:
        folder, dtype = folder / kind, "bfloat16"
    llm = LLM(
        str(folder),
        device="cpu",
        dtype=dtype,
        max_model_len=2048,
        enable_prefix_caching=False,
        max_num_seqs=4,
    )

    def run(ids: list[int], count: int) -> tuple[list[int], float, float]:
        def timed(tokens: int) -> tuple[list[int], float]:
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            begun = time.perf_counter()
            output = llm.generate([ids], params, use_tqdm=False)[0]
            return list(output.outputs[0].token_ids), time.perf_counter() - begun

        _, first = timed(1)
        tokens, whole = timed(count + 1)
        return tokens, first, whole - first

    return run


def theirs(folder: Path, kind: str, threads: int) -> Run:
    import llama_cpp
    import numpy as np

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    vocab = json.loads((folder / "bf16" / "config.json").read_text())["vocab_size"]
    model = llama_cpp.llama_model_load_from_file(
        str(folder / f"{kind}.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 2048, 2048, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    keep = [quiet]

    def step(ids: list[int]) -> int:
        assert keep
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama.cpp cannot decode")
        row = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(row, (vocab,)).argmax())

    def run(ids: list[int], count: int) -> tuple[list[int], float, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        begun = time.perf_counter()
        tokens = [step(ids)]
        first = time.perf_counter() - begun
        for _ in range(count):
            tokens.append(step([tokens[-1]]))
        return tokens, first, time.perf_counter() - begun - first

    return run


def serve(engine: str, folder: Path, kind: str, threads: int) -> None:
    """A line of JSON in, a line of JSON out."""
    run = (ours if engine == "ours" else theirs)(folder, kind, threads)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)


class Worker:
    """One engine with one format, in a process of its own."""

    def __init__(self, python: str, engine: str, kind: str, a: argparse.Namespace) -> None:
        self.name = f"{engine} {kind}"
        command = [python, __file__, "serve", str(a.folder), "--engine", engine, "--kind", kind]
        self._process = subprocess.Popen(
            [*command, "--threads", str(a.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} has died: see above")
        return json.loads(line)

    def ask(self, ids: list[int], count: int) -> tuple[list[int], float, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([ids, count]) + "\n")
        self._process.stdin.flush()
        tokens, first, rest = self._answer()
        return tokens, first, rest

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def run(a: argparse.Namespace) -> None:
    vocab = json.loads((a.folder / "bf16" / "config.json").read_text())["vocab_size"]
    pairs = [pair for pair in PAIRS if pair[0] in a.kinds.split(",")]
    rows = []
    for mine, other in pairs:
        workers = [Worker(sys.executable, "ours", mine, a), Worker(a.llama, "theirs", other, a)]
        ids = prompt_ids(a.prompt, 0, vocab)
        same = [worker.ask(ids, 8)[0] for worker in workers]
        agreed = next((i for i, (x, y) in enumerate(zip(*same, strict=True)) if x != y), 9)
        prefill: list[list[float]] = [[], []]
        decode: list[list[float]] = [[], []]
        for i in range(a.rounds):
            ids = prompt_ids(a.prompt, i + 1, vocab)
            for k, worker in enumerate(workers) if i % 2 == 0 else reversed(list(enumerate(workers))):
                _, first, rest = worker.ask(ids, a.tokens)
                prefill[k].append(a.prompt / first)
                decode[k].append(a.tokens / rest)
        for worker in workers:
            worker.close()
        for what, (x, y) in (("decode", decode), ("prefill", prefill)):
            ratio = statistics.median(p / q for p, q in zip(x, y, strict=True))
            rows.append(
                f"| {what} | {mine} {statistics.median(x):.1f} tok/s | {other} {statistics.median(y):.1f} tok/s "
                f"| {ratio:.2f} |"
            )
        print(rows[-2], rows[-1], f"first {agreed} of 9 greedy tokens alike", sep="\n", flush=True)
    print(
        f"\n| {a.prompt} + {a.tokens} tokens, {a.threads} threads | huoyan | llama.cpp | ratio |\n|---|---|---|---|"
    )
    print("\n".join(rows))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["write", "gguf", "run", "serve"])
    p.add_argument("folder", type=Path)
    p.add_argument("--shape", choices=["1b", "tiny"], default="1b")
    p.add_argument("--llama", help="the python that has llama_cpp")
    p.add_argument("--kinds", default="bf16,float32,int4,int4+int8", help="which of ours")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    p.add_argument("--tokens", type=int, default=32, help="tokens to decode after the first")
    p.add_argument("--engine", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    p.add_argument("--kind", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.what == "write":
        write(a.folder, a.shape)
    elif a.what == "gguf":
        write_gguf(a.folder)
    elif a.what == "serve":
        serve(a.engine, a.folder, a.kind, a.threads)
    elif a.llama is None:
        p.error("run needs --llama, the python that has llama_cpp")
    else:
        run(a)


if __name__ == "__main__":
    main()
