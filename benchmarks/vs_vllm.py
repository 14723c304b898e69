"""vLLM and huoyan one after the other on one device, with the same checkpoint and the same work.

usage: python benchmarks/vs_vllm.py --vllm-python PY [--shape full] [--formats bf16,int4] [--rows ...] [--out DIR]

A random checkpoint is written once a format (or taken from --checkpoint, --checkpoint-int4); each engine reads it in
a process of its own, is warmed up, and does the rows of `ROWS`. Prints both and their ratio, above 1 where huoyan is
the faster; writes DIR/vs_vllm.json, and DIR/vs_vllm.png where matplotlib is installed. On a machine without a GPU it
runs at toy sizes, which tells that it works and nothing else. Rows that failed are in the JSON with their reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
ENGINES = ("vllm", "huoyan")
GIB = 1 << 30


@dataclass(frozen=True)
class Sizes:
    """How much work a row is."""

    prompt: int = 512
    """Tokens of the prompt of the row of one sequence."""
    decoded: int = 256
    batch: int = 128
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
    prompt=24, decoded=8, batch=3, batch_prompt=12, batch_decoded=4, picture=(90, 60),
    pictures=((40, 40), (90, 60)), beams=(2, 6), frames=(2, 3), frame=(64, 36), requests=3, requests_decoded=4,
    max_model_len=2048, long_model_len=2048, repeats=1,
)  # fmt: skip
ROWS = ("decode", "batch", "beams", "pictures", "four", "video", "requests", "ready", "memory")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", default=sys.executable, help="python of vLLM's environment")
    parser.add_argument("--shape", default="full", help="of the random checkpoint: full or small")
    parser.add_argument("--formats", default="bf16,int4")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--checkpoint", type=Path, help="a folder in 16 bits, instead of a random one")
    parser.add_argument("--checkpoint-int4", type=Path)
    parser.add_argument("--toy", action="store_true", help="toy sizes, as on a machine without a GPU")
    parser.add_argument("--cap-gib", type=float, default=24, help="of the memory row")
    parser.add_argument("--out", type=Path, default=Path("vs_vllm"))
    parser.add_argument("--seconds", type=float, default=3000, help="an engine's run at most")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(json.loads(given.child))
    unknown = set(given.rows.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"no row {sorted(unknown)[0]!r}: there are {', '.join(ROWS)}")
    return parent(given)


# -- the parent: it imports neither engine -------------------------------------------------------------------


def parent(given: argparse.Namespace) -> int:
    given.out.mkdir(parents=True, exist_ok=True)
    cuda = has_cuda()
    toy = given.toy or not cuda
    found: dict[str, dict[str, dict]] = {}
    with tempfile.TemporaryDirectory(prefix="vs-vllm-") as temporary:
        for form in given.formats.split(","):
            folder = given.checkpoint if form == "bf16" else given.checkpoint_int4
            folder = folder or write_checkpoint(Path(temporary) / form, given.shape, form, cuda)
            found[form] = {}
            for engine in ENGINES:
                read_once(folder)
                job = {
                    "engine": engine, "form": form, "folder": str(folder), "cuda": cuda, "cap_gib": given.cap_gib,
                    "sizes": asdict(TOY if toy else FULL), "rows": given.rows.split(","),
                    "out": str(given.out / f"{engine}-{form}.json"),
                }  # fmt: skip
                rows = [row for row in job["rows"] if row != "memory"]
                found[form][engine] = run_child(given, {**job, "rows": rows})
                if "memory" in job["rows"] and cuda:
                    # Its engine has the card to itself.
                    out = str(given.out / f"{engine}-{form}-memory.json")
                    capped = run_child(given, {**job, "rows": ["memory"], "out": out})
                    for part, values in capped.items():
                        found[form][engine][part].update(values)
    report = {"toy": toy, "cuda": cuda, "shape": given.shape, "formats": found, "ratios": ratios(found)}
    (given.out / "vs_vllm.json").write_text(json.dumps(report, indent=1))
    print_table(found)
    if toy:
        print("\ntoy sizes: these numbers say that the script works, not which engine is the faster")
    draw(report, given.out / "vs_vllm.png")
    return int(any(not rows["values"] for engines in found.values() for rows in engines.values()))


def has_cuda() -> bool:
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def own_environment() -> dict[str, str]:
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def write_checkpoint(folder: Path, shape: str, form: str, cuda: bool) -> Path:
    """In a process of its own, so that nothing of it stays on the device."""
    command = [sys.executable, "-m", "huoyan.bench.random_checkpoint", str(folder), "--shape", shape]
    command += ["--quantization", "awq"] if form == "int4" else []
    command += ["--device", "cuda"] if cuda else []
    subprocess.run(command, check=True, env=own_environment(), stdout=subprocess.DEVNULL)
    return folder


def read_once(folder: Path) -> None:
    """Both engines start with the weights in the page cache."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def run_child(given: argparse.Namespace, job: dict) -> dict:
    """What an engine's process wrote, even where it ended badly: it writes after every row."""
    python = sys.executable if job["engine"] == "huoyan" else given.vllm_python
    environment = own_environment()
    if job["engine"] == "vllm":
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out, log = Path(job["out"]), Path(job["out"]).with_suffix(".log")
    out.unlink(missing_ok=True)
    print(f"{job['engine']}, {job['form']} (log: {log})", flush=True)
    job = {**job, "begun": time.time()}
    reason = ""
    with log.open("w") as file:
        try:
            ended = subprocess.run(
                [python, str(HERE), "--child", json.dumps(job)], stdout=file, stderr=subprocess.STDOUT,
                env=environment, timeout=given.seconds, check=False,
            )  # fmt: skip
            reason = f"it ended with {ended.returncode}" if ended.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"it took more than {given.seconds:g} s"
    rows = json.loads(out.read_text()) if out.exists() else {"values": {}, "prompts": {}, "failed": {}}
    if reason:
        rows["failed"]["the process"] = f"{reason}: see {log}"
        print(
            f"  {job['engine']}: {reason}; its log ends with", *log.read_text().splitlines()[-3:], sep="\n  "
        )
    return rows


def faster(name: str) -> bool:
    """Whether more is better."""
    return name.endswith(("tok_s", "req_s", "tokens"))


def ratios(found: dict[str, dict[str, dict]]) -> dict[str, dict[str, float]]:
    """huoyan to vLLM, above 1 where huoyan is the better."""
    result: dict[str, dict[str, float]] = {}
    for form, engines in found.items():
        theirs, ours = (engines[engine]["values"] for engine in ENGINES)
        result[form] = {
            name: ours[name] / theirs[name] if faster(name) else theirs[name] / ours[name]
            for name in theirs
            if name in ours and theirs[name] > 0 and ours[name] > 0
        }
    return result


def print_table(found: dict[str, dict[str, dict]]) -> None:
    for form, engines in found.items():
        print(f"\n{form:34} {'vLLM':>12} {'huoyan':>12} {'ratio':>8}")
        theirs, ours = (engines[engine]["values"] for engine in ENGINES)
        each = ratios(found)[form]
        for name in [*theirs, *(n for n in ours if n not in theirs)]:
            cells = [f"{side[name]:12.2f}" if name in side else f"{'-':>12}" for side in (theirs, ours)]
            print(f"{name:34} {' '.join(cells)} " + (f"{each[name]:8.2f}" if name in each else f"{'-':>8}"))
        for engine in ENGINES:
            for row, reason in engines[engine]["failed"].items():
                print(f"  {engine} {row}: {reason}")
        # The same work, or no comparison.
        for name, count in engines["vllm"]["prompts"].items():
            own = engines["huoyan"]["prompts"].get(name, count)
            if own != count:
                print(f"  {name}: prompts of {count} tokens in vLLM and {own} here: not the same work")


def draw(report: dict, target: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: matplotlib is not installed")
        return
    forms = {form: values for form, values in report["ratios"].items() if values}
    if not forms:
        return
    names = list(dict.fromkeys(name for values in forms.values() for name in values))
    figure = Figure(figsize=(8, 1.2 + 0.34 * len(names) * len(forms)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(forms)
    for i, (form, values) in enumerate(forms.items()):
        shown = [(at, values[name]) for at, name in enumerate(names) if name in values]
        bars = axes.barh(
            [at + i * height for at, _ in shown], [v for _, v in shown], height * 0.9, label=form
        )
        axes.bar_label(bars, fmt=" %.2f", fontsize=8)
    axes.set_yticks([at + height * (len(forms) - 1) / 2 for at in range(len(names))], names, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    title = "huoyan to vLLM, same device, same run (1 is equal, more is better)"
    axes.set_title(("TOY SIZES: " if report["toy"] else "") + title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=150)
    print(f"chart: {target}")


# -- the child: one engine -----------------------------------------------------------------------------------


def child(job: dict) -> int:
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false")
    done: dict[str, dict] = {"values": {}, "prompts": {}, "failed": {}}

    def save() -> None:
        Path(job["out"]).write_text(json.dumps(done, indent=1))

    with contextlib.ExitStack() as stack:
        opener = open_vllm if job["engine"] == "vllm" else open_huoyan
        folder = job["folder"]
        if job["engine"] == "vllm":
            folder = peer_folder(folder, stack)
        sizes = Sizes(**{n: _tuples(v) for n, v in job["sizes"].items()})
        if set(job["rows"]) - {"memory"}:
            llm = opener(folder, job, sizes.max_model_len, None)
            work = Work(llm, job, sizes, done["prompts"])
            work.ready()
            if "ready" in job["rows"]:
                done["values"]["ready_s"] = time.time() - job["begun"]
                save()
            for row in ("decode", "pictures", "four", "beams", "batch", "video", "requests"):
                if row not in job["rows"]:
                    continue
                try:
                    for name, value in getattr(work, row)():
                        done["values"][name] = value
                        print(name, value, flush=True)
                        save()
                except Exception as error:
                    done["failed"][row] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                save()
        if "memory" in job["rows"]:
            try:
                for name, value in memory_row(folder, job, sizes):
                    done["values"][name] = value
            except Exception as error:
                done["failed"]["memory"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            save()
    return 0


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def peer_folder(folder: str, stack: contextlib.ExitStack) -> str:
    """A copy with the classes that vLLM imports from a checkpoint, its weights linked."""
    sys.path.insert(0, str(ROOT / "tests" / "peer"))
    import torch
    from vllm_answers import SETTINGS, peer_copy

    if not torch.cuda.is_available():
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
    copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vs-vllm-peer-")))
    peer_copy(folder, copy)
    return str(copy)


def open_vllm(folder: str, job: dict, max_model_len: int, cap: float | None):
    """As vLLM is best run: graphs and compilation on a GPU, its fastest int4 kernel."""
    import torch

    cuda = torch.cuda.is_available()
    if not cuda:
        torch.cuda.is_current_stream_capturing = lambda: False
    from vllm import LLM

    options: dict = {"dtype": "bfloat16" if job["form"] == "bf16" else "float16"}
    if cuda:
        total = torch.cuda.mem_get_info()[1]
        options["gpu_memory_utilization"] = 0.9 if cap is None else cap * GIB / total
        options |= {"quantization": "awq_marlin"} if job["form"] == "int4" else {}
    else:
        options |= {"dtype": "float32" if job["form"] == "bf16" else "float16"}
        options |= {"enforce_eager": True, "skip_mm_profiling": True}
    return LLM(
        folder, trust_remote_code=True, max_model_len=max_model_len, max_num_seqs=256 if cuda else 8,
        limit_mm_per_prompt={"image": 16 if cap else 4, "video": 1}, seed=0, **options,
    )  # fmt: skip


def open_huoyan(folder: str, job: dict, max_model_len: int, cap: float | None):
    from huoyan import LLM

    dtype = "bfloat16" if job["form"] == "bf16" else "float16"
    if not job["cuda"]:
        dtype = "float32" if job["form"] == "bf16" else "float16"
    options = {"gpu_memory": f"{cap}GiB"} if cap is not None else {}
    return LLM(
        folder, dtype=dtype, max_model_len=max_model_len, max_num_seqs=256 if job["cuda"] else 8, **options
    )


class Work:
    """The rows. Both engines have the same calls; prompts and pictures are new each time."""

    def __init__(self, llm, job: dict, sizes: Sizes, prompts: dict[str, int]) -> None:
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

    def ready(self) -> None:
        """The first answer: what is compiled or captured at the first request belongs to the start."""
        self.generate([self.ids(8)], 2)

    def decode(self):
        n, more = self.sizes.prompt, self.sizes.decoded
        first = self.timed("text", lambda: [self.ids(n)], 1)
        all_of_it = self.timed("text", lambda: [self.ids(n)], 1 + more)
        yield f"text_{n}_first_token_ms", first * 1e3
        yield "decode_1_tok_s", more / (all_of_it - first)

    def batch(self):
        count, n, more = self.sizes.batch, self.sizes.batch_prompt, self.sizes.batch_decoded

        def prompts():
            return [self.ids(n) for _ in range(count)]

        first = self.timed("batch", prompts, 1, repeats=1)
        all_of_it = self.timed("batch", prompts, 1 + more, repeats=1)
        yield f"decode_{count}_tok_s", count * more / (all_of_it - first)

    def pictures(self):
        for width, height in self.sizes.pictures:
            name = f"picture_{width}x{height}"
            took = self.timed(name, lambda: [self.about([(width, height)])], 1)  # noqa: B023
            yield f"{name}_first_token_ms", took * 1e3

    def four(self):
        took = self.timed("four_pictures", lambda: [self.about([self.sizes.picture] * 4)], 1)
        yield "four_pictures_first_token_ms", took * 1e3

    def beams(self):
        short, long = self.sizes.beams

        def search(tokens: int) -> float:
            params = self.beam_params(beam_width=3, max_tokens=tokens, ignore_eos=True)
            prompt = self.about([self.sizes.picture])
            begun = time.perf_counter()
            self.llm.beam_search([prompt], params)
            return time.perf_counter() - begun

        search(short)
        times = {n: sorted(search(n) for _ in range(self.sizes.repeats)) for n in (short, long)}
        middle = {n: each[len(each) // 2] for n, each in times.items()}
        yield f"beam3_{long}_tokens_total_s", middle[long]
        yield "beam3_step_ms", (middle[long] - middle[short]) / (long - short) * 1e3

    def video(self):
        import numpy as np

        for count in self.sizes.frames:

            def prompt(count: int = count) -> dict:
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

    def requests(self):
        count, tokens = self.sizes.requests, self.sizes.requests_decoded

        def prompts():
            return [self.about([self.sizes.picture]) for _ in range(count)]

        self.generate(prompts()[: max(count // 8, 1)], tokens)
        made = prompts()
        begun = time.perf_counter()
        self.generate(made, tokens)
        yield f"{count}_pictures_req_s", count / (time.perf_counter() - begun)

    # -- helpers ---------------------------------------------------------------------------------------------

    def generate(self, prompts: list[dict], tokens: int):
        params = self.params(
            temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        for output in outputs:
            error = getattr(output, "error", None)
            if error or len(output.outputs[0].token_ids) != tokens:
                raise RuntimeError(error or f"{len(output.outputs[0].token_ids)} tokens, not {tokens}")
        return outputs

    def timed(self, name: str, make, tokens: int, repeats: int | None = None) -> float:
        """Median seconds over new prompts, after one run that is not counted."""
        outputs = self.generate(make(), tokens)
        self.prompts[name] = len(outputs[0].prompt_token_ids)
        times = []
        for _ in range(repeats or self.sizes.repeats):
            prompts = make()
            begun = time.perf_counter()
            self.generate(prompts, tokens)
            times.append(time.perf_counter() - begun)
        return sorted(times)[len(times) // 2]

    def ids(self, count: int) -> dict:
        return {"prompt_token_ids": self.rng.integers(0, 255, count).tolist()}

    def picture(self, width: int, height: int):
        import numpy as np
        from PIL import Image

        coarse = (max(height // 16, 1), max(width // 16, 1), 3)
        return Image.fromarray(self.rng.integers(0, 255, coarse, dtype=np.uint8)).resize((width, height))

    def chat(self, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def about(self, sizes) -> dict:
        """vLLM wants a picture by itself, several as a list; both engines take both."""
        pictures = [self.picture(*size) for size in sizes]
        return {
            "prompt": self.chat("(<image>./</image>)\n" * len(pictures) + "hello"),
            "multi_modal_data": {"image": pictures if len(pictures) > 1 else pictures[0]},
        }


def memory_row(folder: str, job: dict, sizes: Sizes):
    """Tokens that the KV cache holds when the engine may take no more than the cap."""
    cap = job["cap_gib"]
    name = f"kv_in_{cap:g}_GiB_tokens"
    if job["engine"] == "vllm":
        llm = open_vllm(folder, job, sizes.long_model_len, cap)
        cache = llm.llm_engine.vllm_config.cache_config
        yield name, (cache.num_gpu_blocks or 0) * cache.block_size
        return
    llm = open_huoyan(folder, job, sizes.long_model_len, cap)
    engine = llm._runtime.backend
    yield name, engine.size.num_blocks * engine.config.block_size


if __name__ == "__main__":
    sys.exit(main())
