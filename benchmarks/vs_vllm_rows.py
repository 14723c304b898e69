"""The rows of vs_vllm.py, done by one engine in this process: `python vs_vllm_rows.py JOB.json`.

Runs in the environment of either engine. The results are written after every number, so that a run which is ended
loses nothing; a job that lists the rows done already (`--resume`) goes on behind them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30
MEMORY_FRACTION = 0.9
"""Of the card, both engines, in every row but `memory`."""
ROWS = ("ready", "decode", "batch", "requests", "video", "pictures", "four", "beams", "memory")


@dataclass(frozen=True)
class Sizes:
    """How much work a row is."""

    prompt: int = 512
    """Tokens of the prompt of the row of one sequence."""
    decoded: int = 256
    batches: tuple[int, ...] = (8, 32, 64, 128)
    batch_prompt: int = 256
    batch_decoded: int = 128
    picture: tuple[int, int] = (1344, 896)
    pictures: tuple[tuple[int, int], ...] = ((448, 448), (1344, 896), (1344, 1344))
    beams: tuple[int, int] = (32, 64)
    """Tokens of the two beam searches whose difference is the time of their steps."""
    frames: tuple[int, ...] = (16, 64)
    frame: tuple[int, int] = (640, 360)
    requests: int = 64
    requests_decoded: int = 128
    max_model_len: int = 8192
    long_model_len: int = 32768
    repeats: int = 3


FULL = Sizes()
TOY = Sizes(
    prompt=24, decoded=8, batches=(2, 3), batch_prompt=12, batch_decoded=4, picture=(90, 60),
    pictures=((40, 40), (90, 60)), beams=(2, 6), frames=(2, 3), frame=(64, 36), requests=3, requests_decoded=4,
    max_model_len=2048, long_model_len=2048, repeats=1,
)  # fmt: skip


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false")
    sizes = Sizes(**{name: _tuples(value) for name, value in job["sizes"].items()})
    out = Path(job["out"])
    done = json.loads(out.read_text()) if out.exists() else new_results(job)
    # What failed may have failed for the time that was given to it.
    done["failed"] = {}

    def save() -> None:
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(done, indent=1))
        partial.replace(out)

    def run(row: str, numbers: Callable[[], Iterator[tuple[str, float]]]) -> None:
        try:
            for name, value in numbers():
                done["values"][name] = value
                print(f"{time.time() - job['begun']:6.1f} s  {name} {value}", flush=True)
                save()
            done["rows"].append(row)
        except Exception as error:
            done["failed"][row] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{row}: {done['failed'][row]}", flush=True)
        save()

    wanted = [row for row in ROWS if row in job["rows"] and row not in done["rows"]]
    if wanted == ["memory"]:
        run("memory", lambda: memory_row(job, sizes))
    elif wanted:
        llm = OPENERS[job["engine"]](job, sizes.max_model_len, None)
        work = Work(llm, job, sizes, done["prompts"])
        # The first answer: what is compiled or captured at the first request belongs to the start.
        work.generate([work.ids(8)], 2)
        took = time.time() - job["begun"]
        done["device"] = device_name()
        for row in wanted:
            if row == "ready":
                run(row, lambda: iter([("ready_s", took)]))
                if job["engine"] == "vllm" and job["cuda"]:
                    done["notes"] |= derive_memory(llm, job, done["values"])
            else:
                run(row, getattr(work, row))
    save()
    return 0


def new_results(job: dict[str, Any]) -> dict[str, Any]:
    """What a results file holds before the first row."""
    kept = ("engine", "form", "cuda", "toy", "shape", "dummy", "alone", "sizes")
    parts: dict[str, Any] = {"values": {}, "prompts": {}, "notes": {}, "failed": {}, "rows": [], "device": ""}
    return {name: job[name] for name in kept} | parts


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


# -- the engines ---------------------------------------------------------------------------------------------


def open_vllm(job: dict[str, Any], max_model_len: int, cap: float | None) -> Any:
    """As vLLM is best run: graphs and compilation on a GPU, its fastest int4 kernel."""
    import torch

    options: dict[str, Any] = {"dtype": "bfloat16" if job["form"] == "bf16" else "float16"}
    if job["cuda"]:
        options["gpu_memory_utilization"] = MEMORY_FRACTION if cap is None else cap * GIB / total_memory()
        options |= {"quantization": "awq_marlin"} if job["form"] == "int4" else {}
    else:
        # A CPU build of torch raises where the model's resampler asks; the engine must be in this process for that.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        torch.cuda.is_current_stream_capturing = lambda: False
        options |= {"dtype": "float32" if job["form"] == "bf16" else "float16"}
        options |= {"enforce_eager": True, "skip_mm_profiling": True}
    options |= {"load_format": "dummy"} if job["dummy"] else {}
    options |= {"trust_remote_code": True} if job["alone"] else {}
    from vllm import LLM

    return LLM(
        job["folder"], max_model_len=max_model_len, max_num_seqs=256 if job["cuda"] else 8,
        limit_mm_per_prompt={"image": 16 if cap else 4, "video": 1}, seed=0, **options,
    )  # fmt: skip


def open_huoyan(job: dict[str, Any], max_model_len: int, cap: float | None) -> Any:
    from huoyan import LLM

    dtype = "bfloat16" if job["form"] == "bf16" else "float16"
    if not job["cuda"]:
        dtype = "float32" if job["form"] == "bf16" else "float16"
    options: dict[str, Any] = {"gpu_memory": f"{cap}GiB"} if cap is not None else {}
    options |= {"load_format": "dummy"} if job["dummy"] else {}
    return LLM(
        job["folder"], dtype=dtype, max_model_len=max_model_len, max_num_seqs=256 if job["cuda"] else 8,
        **options,
    )  # fmt: skip


OPENERS = {"vllm": open_vllm, "huoyan": open_huoyan}


def total_memory() -> int:
    """Bytes of the card."""
    import torch

    return int(torch.cuda.mem_get_info()[1])


# -- memory --------------------------------------------------------------------------------------------------


def memory_row(job: dict[str, Any], sizes: Sizes) -> Iterator[tuple[str, float]]:
    """Tokens that the KV cache holds when the engine may take no more than the cap, by a start of its own."""
    cap = job["cap_gib"]
    llm = OPENERS[job["engine"]](job, sizes.long_model_len, cap)
    if job["engine"] == "vllm":
        yield memory_name(cap), vllm_cache_tokens(llm)
        return
    engine = llm._runtime.backend
    yield memory_name(cap), engine.size.num_blocks * engine.config.block_size


def memory_name(cap: float) -> str:
    return f"kv_in_{cap:g}_GiB_tokens"


def vllm_cache_tokens(llm: Any) -> int:
    cache = llm.llm_engine.vllm_config.cache_config
    return (cache.num_gpu_blocks or 0) * cache.block_size


def derive_memory(llm: Any, job: dict[str, Any], values: dict[str, float]) -> dict[str, str]:
    """vLLM's row `memory` without a second start, which takes it a minute: the cache has what its budget leaves.

    vLLM gives the cache its budget less what a trial run needed, which is the same under the smaller budget. Adds
    the number to `values` and returns the note that goes with it.
    """
    config = json.loads((Path(job["folder"]) / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    token_bytes = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    less = MEMORY_FRACTION * total_memory() - job["cap_gib"] * GIB
    name = memory_name(job["cap_gib"])
    values[name] = int(vllm_cache_tokens(llm) - less / token_bytes)
    return {
        name: f"vLLM's number is its cache at {MEMORY_FRACTION:g} of the card, less what that is above the cap"
    }


# -- the rows ------------------------------------------------------------------------------------------------


class Work:
    """The rows. Both engines have the same calls; prompts and pictures are new each time."""

    def __init__(self, llm: Any, job: dict[str, Any], sizes: Sizes, prompts: dict[str, int]) -> None:
        import numpy as np

        self.llm, self.sizes, self.prompts = llm, sizes, prompts
        self.own = job["engine"] == "huoyan"
        self.rng = np.random.default_rng(0)
        self.tokenizer = llm.get_tokenizer()
        if self.own:
            from huoyan import BeamSearchParams, SamplingParams
        else:
            from vllm import SamplingParams
            from vllm.sampling_params import BeamSearchParams
        self.params, self.beam_params = SamplingParams, BeamSearchParams

    def decode(self) -> Iterator[tuple[str, float]]:
        n, more = self.sizes.prompt, self.sizes.decoded
        first = self.timed("text", lambda: [self.ids(n)], 1)
        yield f"text_{n}_first_token_ms", first * 1e3
        all_of_it = self.timed("text", lambda: [self.ids(n)], 1 + more)
        yield "decode_1_tok_s", more / (all_of_it - first)

    def batch(self) -> Iterator[tuple[str, float]]:
        n, more = self.sizes.batch_prompt, self.sizes.batch_decoded
        for count in self.sizes.batches:

            def prompts(count: int = count) -> list[dict[str, Any]]:
                return [self.ids(n) for _ in range(count)]

            # Once each: a batch is a mean of many already.
            first = self.timed("batch", prompts, 1, repeats=1)
            all_of_it = self.timed("batch", prompts, 1 + more, repeats=1)
            yield f"decode_{count}_tok_s", count * more / (all_of_it - first)

    def pictures(self) -> Iterator[tuple[str, float]]:
        for width, height in self.sizes.pictures:
            name = f"picture_{width}x{height}"
            took = self.timed(name, lambda size=(width, height): [self.about([size])], 1)
            yield f"{name}_first_token_ms", took * 1e3

    def four(self) -> Iterator[tuple[str, float]]:
        took = self.timed("four_pictures", lambda: [self.about([self.sizes.picture] * 4)], 1)
        yield "four_pictures_first_token_ms", took * 1e3

    def beams(self) -> Iterator[tuple[str, float]]:
        short, long = self.sizes.beams

        def search(tokens: int) -> float:
            params = self.beam_params(beam_width=3, max_tokens=tokens, ignore_eos=True)
            prompt = self.about([self.sizes.picture])
            begun = time.perf_counter()
            (found,) = self.llm.beam_search([prompt], params)
            took = time.perf_counter() - begun
            if len(found.sequences) != 3:
                raise RuntimeError(getattr(found, "error", None) or f"{len(found.sequences)} beams, not 3")
            return took

        for _ in range(2):
            search(short)
        middle = {}
        for tokens in (short, long):
            times = sorted(search(tokens) for _ in range(self.sizes.repeats))
            middle[tokens] = times[len(times) // 2]
            yield f"beam3_{tokens}_tokens_total_s", middle[tokens]
        yield "beam3_step_ms", (middle[long] - middle[short]) / (long - short) * 1e3

    def video(self) -> Iterator[tuple[str, float]]:
        import numpy as np

        for count in self.sizes.frames:

            def prompt(count: int = count) -> dict[str, Any]:
                frames = np.stack([np.asarray(self.picture(*self.sizes.frame)) for _ in range(count)])
                # vLLM cuts no frame of a video; huoyan is told not to, either.
                more = {"mm_processor_kwargs": {"max_slice_nums": 1, "max_frames": count}} if self.own else {}
                return {
                    "prompt": self.chat("(<video>./</video>)\nhello"),
                    "multi_modal_data": {"video": [frames]},
                    **more,
                }

            width, height = self.sizes.frame
            name = f"video_{count}x{width}x{height}"
            took = self.timed(name, lambda prompt=prompt: [prompt()], 1)
            yield f"{name}_first_token_ms", took * 1e3

    def requests(self) -> Iterator[tuple[str, float]]:
        count, tokens = self.sizes.requests, self.sizes.requests_decoded

        def prompts() -> list[dict[str, Any]]:
            return [self.about([self.sizes.picture]) for _ in range(count)]

        self.generate(prompts(), tokens)
        made = prompts()
        begun = time.perf_counter()
        self.generate(made, tokens)
        yield f"{count}_pictures_req_s", count / (time.perf_counter() - begun)

    # -- helpers ---------------------------------------------------------------------------------------------

    def generate(self, prompts: list[dict[str, Any]], tokens: int) -> list[Any]:
        params = self.params(
            temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        outputs: list[Any] = self.llm.generate(prompts, params, use_tqdm=False)
        for output in outputs:
            error = getattr(output, "error", None)
            if error or len(output.outputs[0].token_ids) != tokens:
                raise RuntimeError(error or f"{len(output.outputs[0].token_ids)} tokens, not {tokens}")
        return outputs

    def timed(
        self, name: str, make: Callable[[], list[dict[str, Any]]], tokens: int, repeats: int | None = None
    ) -> float:
        """Median seconds over new prompts, after two runs that are not counted.

        What huoyan captures as CUDA graphs it captures at the second use; vLLM did at its start.
        """
        for _ in range(2):
            outputs = self.generate(make(), tokens)
        self.prompts[name] = len(outputs[0].prompt_token_ids)
        times = []
        for _ in range(repeats or self.sizes.repeats):
            prompts = make()
            begun = time.perf_counter()
            self.generate(prompts, tokens)
            times.append(time.perf_counter() - begun)
        return sorted(times)[len(times) // 2]

    def ids(self, count: int) -> dict[str, Any]:
        return {"prompt_token_ids": self.rng.integers(0, 255, count).tolist()}

    def picture(self, width: int, height: int) -> Any:
        import numpy as np
        from PIL import Image

        coarse = (max(height // 16, 1), max(width // 16, 1), 3)
        return Image.fromarray(self.rng.integers(0, 255, coarse, dtype=np.uint8)).resize((width, height))

    def chat(self, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        written: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return written

    def about(self, sizes: list[tuple[int, int]]) -> dict[str, Any]:
        """vLLM wants a picture by itself, several as a list; both engines take both."""
        pictures = [self.picture(*size) for size in sizes]
        return {
            "prompt": self.chat("(<image>./</image>)\n" * len(pictures) + "hello"),
            "multi_modal_data": {"image": pictures if len(pictures) > 1 else pictures[0]},
        }


if __name__ == "__main__":
    sys.exit(main())
