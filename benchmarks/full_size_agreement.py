"""Do vLLM and huoyan compute the same at full size? A random checkpoint that both read, and a dozen prompts.

usage: python benchmarks/full_size_agreement.py --vllm-python PY [--shape full] [--formats bf16,int4] [--out DIR]
           [--checkpoint FOLDER] [--checkpoint-int4 FOLDER] [--int4-list NAME,NAME]

The prompts are those of tests/peer/cases.py: in words alone and with one to three pictures. vLLM (with huoyan's plugin)
answers greedily with the log-probabilities of its five likeliest tokens. Then huoyan reads prompt and answer of vLLM's
in the same 16 bits with its kernels (HUOYAN_CUDA_KERNELS=1), and once more in float32 without them, which is the
reference; and answers greedily by itself, which is held against the reference too, as far as the answers are equal.

The measure of 16-bit noise is how far vLLM itself is from the reference: the root of the mean square, and the
largest, difference of the log-probabilities of its five likeliest tokens over all steps. huoyan agrees where its own
are at most 1.5 times as far from the reference (`--factor`), and where the answers of the two part only at a tie: the
reference has the two tokens within four times the sum of both root mean squares. Where --no-reference leaves the
float32 run out (for want of memory), the two are only held against each other.

On a machine without a GPU --shape small tests the script itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
TOP = 5
DECODING = "decoding to float32"
"""The measure of huoyan's own answers, which its decode kernels made; the other two read them as a prompt."""
LEAST_NOISE = 1e-3
"""Differences up to here are the order of float32 sums."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--shape", default="full", help="full or small")
    parser.add_argument("--formats", default="bf16,int4")
    parser.add_argument("--dtype", default="bfloat16", help="what both compute the 16-bit checkpoint in")
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--factor", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--checkpoint", type=Path, help="a folder in 16 bits, instead of a random one")
    parser.add_argument("--checkpoint-int4", type=Path)
    parser.add_argument("--int4-list", help="modules_to_not_convert of vLLM's copy of the int4 checkpoint")
    parser.add_argument("--out", type=Path, default=Path("agreement"))
    parser.add_argument("--child", nargs=3, metavar=("JOB", "ANSWERS", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(*map(Path, given.child))
    return parent(given)


# -- the parent ----------------------------------------------------------------------------------------------


def parent(given: argparse.Namespace) -> int:
    import torch
    from tests.peer.cases import Case, requests, write_pictures
    from tests.peer.environment import with_plugin
    from tests.vllm_plugin.published import publish

    cuda = torch.cuda.is_available()
    given.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"shape": given.shape, "cuda": cuda, "seed": given.seed, "formats": {}}
    with tempfile.TemporaryDirectory(prefix="agreement-") as temporary:
        root = Path(temporary)
        (root / "pictures").mkdir()
        pictures = write_pictures(root / "pictures")
        for form in given.formats.split(","):
            folder = given.checkpoint_int4 if form == "int4" else given.checkpoint
            if folder is None:
                folder = root / form
                write_checkpoint(folder, given.shape, form, given.seed, cuda)
            dtype = "float16" if form == "int4" else given.dtype
            case = Case(form, None)
            job = {
                "folder": str(folder), "dtype": dtype, "max_model_len": given.max_model_len,
                "max_tokens": given.max_tokens, "mm_processor_kwargs": {},
                "requests": [{**r, "beams": 0} for r in requests(case, pictures)],
            }  # fmt: skip
            jobs, theirs = root / f"{form}.json", root / f"{form}-vllm.json"
            their_folder = folder
            if form == "int4" and given.int4_list:
                fields = json.loads((folder / "config.json").read_text())["quantization_config"]
                fields["modules_to_not_convert"] = given.int4_list.split(",")
                their_folder = publish(folder, root / "listed", quantization_config=fields)
            jobs.write_text(json.dumps({"job": {**job, "folder": str(their_folder)}}))
            run(
                [given.vllm_python, str(ROOT / "tests" / "peer" / "vllm_answers.py"), str(jobs), str(theirs)],
                given.out / f"vllm-{form}.log",
                with_plugin(root / "site"),
            )
            answers = json.loads(theirs.read_text())["job"]["answers"]
            ours = {}
            for kind in dict.fromkeys((dtype, *(() if given.no_reference else ("float32",)))):
                out = root / f"{form}-{kind}.json"
                job_of = root / f"{form}-{kind}-job.json"
                reference = kind != dtype
                job_of.write_text(json.dumps({**job, "dtype": kind, "answer": not reference}))
                command = [
                    sys.executable,
                    str(HERE),
                    "--child",
                    *map(str, (job_of, theirs, out)),
                ]
                environment = {"PYTHONPATH": path(), "HUOYAN_CUDA_KERNELS": "0" if reference else "1"}
                run(command, given.out / f"huoyan-{form}-{kind}.log", {**os.environ, **environment})
                ours[kind] = json.loads(out.read_text())
            found = compare(answers, ours[dtype], ours.get("float32"), given.factor)
            report["formats"][form] = {"dtype": dtype, "int4_list": given.int4_list, **found}
            show(form, dtype, found)
            (given.out / "agreement.json").write_text(json.dumps(report, indent=1))
    return int(not all(found["agrees"] for found in report["formats"].values()))


def path() -> str:
    return os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])


def write_checkpoint(folder: Path, shape: str, form: str, seed: int, cuda: bool) -> None:
    command = [sys.executable, "-m", "huoyan.bench.random_checkpoint", str(folder), "--shape", shape]
    command += ["--seed", str(seed), "--device", "cuda" if cuda else "cpu"]
    command += ["--quantization", "awq"] if form == "int4" else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path()})


def run(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """One engine, alone on the device."""
    print(f"{Path(command[1]).name} (log: {log})", flush=True)
    with log.open("w") as file:
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        last = "\n  ".join(log.read_text().splitlines()[-5:])
        sys.exit(f"{' '.join(command[:2])} ended with {ended.returncode}; its log ends with\n  {last}")


def compare(
    theirs: dict[str, Any], ours: dict[str, Any], reference: dict[str, Any] | None, factor: float
) -> dict[str, Any]:
    """The measures of one format. `ours` and `reference` read along vLLM's tokens; `ours` has its own answers too.

    Raises:
        SystemExit: the prompts are not the same; nothing else could be compared then.
    """
    apart: dict[str, list[float]] = {"huoyan to vllm": []}
    if reference is not None:
        apart |= {"vllm to float32": [], "huoyan to float32": [], DECODING: []}
    for request, answer in theirs.items():
        if ours[request]["prompt_token_ids"] != answer["prompt_token_ids"]:
            sys.exit(f"request {request}: the prompts' token ids differ")
        alike = same_tokens(answer, ours[request])
        for step, peer in enumerate(answer["logprobs"]):
            own = ours[request]["led"][step]
            exact = None if reference is None else reference[request]["led"][step]
            for token in sorted(peer, key=lambda token: -peer[token])[:TOP]:
                if token in own:
                    apart["huoyan to vllm"].append(abs(own[token] - peer[token]))
                if exact is not None and token in exact and token in own:
                    apart["vllm to float32"].append(abs(peer[token] - exact[token]))
                    apart["huoyan to float32"].append(abs(own[token] - exact[token]))
                # The step that parts has the same tokens before it.
                decoded = ours[request]["decoded"][step] if step <= alike else {}
                if exact is not None and token in exact and token in decoded:
                    apart[DECODING].append(abs(decoded[token] - exact[token]))
    steps = sum(len(answer["logprobs"]) for answer in theirs.values())
    measures = {
        name: {"rms": math.sqrt(sum(d * d for d in each) / len(each)), "largest": max(each)}
        for name, each in apart.items()
    }
    seen = len(apart["huoyan to vllm"]) / (TOP * steps)
    noise = (
        measures["huoyan to float32"]["rms"] + measures["vllm to float32"]["rms"]
        if reference is not None
        else measures["huoyan to vllm"]["rms"]
    )
    tie = 4 * max(noise, LEAST_NOISE)
    parted = [
        split for request, answer in theirs.items() if (split := parting(request, answer, ours, reference))
    ]
    limit = LEAST_NOISE
    if reference is not None:
        limit = max(factor * measures["vllm to float32"]["rms"], LEAST_NOISE)
        within = max(measures[name]["rms"] for name in ("huoyan to float32", DECODING)) <= limit
    else:
        within = True
    return {
        "requests": len(theirs),
        "steps": steps,
        "measures": measures,
        "limit_rms": limit if reference is not None else None,
        "likeliest_seen": seen,
        "equal_answers": len(theirs) - len(parted),
        "parted": parted,
        "tie": tie,
        "agrees": within and seen >= 0.99 and all(split["gap"] <= tie for split in parted),
    }


def same_tokens(answer: dict[str, Any], own: dict[str, Any]) -> int:
    """Tokens of the two greedy answers before they part."""
    pairs = list(zip(answer["token_ids"], own["token_ids"], strict=True))
    return next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), len(pairs))


def parting(
    request: str, answer: dict[str, Any], ours: dict[str, Any], reference: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Where two greedy answers part first, and how far apart the two tokens are there."""
    at = same_tokens(answer, ours[request])
    if at == len(answer["token_ids"]):
        return None
    likely = (ours if reference is None else reference)[request]["led"][at]
    tokens = (str(answer["token_ids"][at]), str(ours[request]["token_ids"][at]))
    # A token that is not even among the likeliest is no tie.
    gap = abs(likely[tokens[0]] - likely[tokens[1]]) if all(t in likely for t in tokens) else math.inf
    return {"request": request, "step": at, "tokens": tokens, "gap": gap}


def show(form: str, dtype: str, found: dict[str, Any]) -> None:
    print(f"{form} ({dtype}): {found['requests']} prompts, {found['steps']} steps, top {TOP}")
    for name, measure in found["measures"].items():
        print(f"  {name:20} rms {measure['rms']:.2e}, largest {measure['largest']:.2e}")
    if found["limit_rms"] is not None:
        print(f"  huoyan may be {found['limit_rms']:.2e} from float32")
    print(f"  vLLM's {TOP} likeliest that are among huoyan's: {100 * found['likeliest_seen']:.1f} %")
    print(f"  greedy answers equal: {found['equal_answers']} of {found['requests']}")
    for split in found["parted"]:
        print(f"  request {split['request']} parts at step {split['step']}, {split['gap']:.2e} apart there "
              f"(a tie up to {found['tie']:.2e})")  # fmt: skip
    print("  agrees" if found["agrees"] else "  DOES NOT AGREE", flush=True)


# -- the child: huoyan ---------------------------------------------------------------------------------------


def child(job_file: Path, answers_file: Path, out: Path) -> int:
    from tests.peer.test_agreement import MORE, _conversation, _led, _prompt

    from huoyan import LLM, SamplingParams

    job = json.loads(job_file.read_text())
    answers = json.loads(answers_file.read_text())["job"]["answers"]
    greedy = SamplingParams(temperature=0, max_tokens=job["max_tokens"], logprobs=MORE, ignore_eos=True)
    read = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=MORE, ignore_eos=True)
    found: dict[str, dict[str, Any]] = {}
    options = {"max_model_len": job["max_model_len"], "max_num_seqs": 16, "enable_prefix_caching": False}
    with LLM(job["folder"], dtype=job["dtype"], **options) as llm:
        for request in job["requests"]:
            answer = answers[request["id"]]
            (led,) = llm.generate([_led(request, answer)], read, use_tqdm=False, raise_on_error=True)
            read_of = found[request["id"]] = {
                "led": _steps(led.prompt_logprobs[len(answer["prompt_token_ids"]) :])
            }
            if not job["answer"]:
                continue
            # The second answer counts: whole prompts are captured as CUDA graphs when they come again.
            for _ in range(2):
                if "question" in request:
                    (own,) = llm.chat(_conversation(request), greedy, use_tqdm=False)
                else:
                    (own,) = llm.generate([_prompt(request)], greedy, use_tqdm=False, raise_on_error=True)
            made = own.outputs[0]
            read_of |= {"prompt_token_ids": own.prompt_token_ids, "token_ids": made.token_ids}
            read_of["decoded"] = _steps(made.logprobs)
    out.write_text(json.dumps(found))
    return 0


def _steps(steps: list[Any]) -> list[dict[str, float]]:
    return [{str(token): entry.logprob for token, entry in step.items()} for step in steps]


if __name__ == "__main__":
    sys.exit(main())
