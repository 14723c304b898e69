"""An int4 checkpoint as hubs have it, whose `modules_to_not_convert` is incomplete: does vLLM load it and answer?

usage: python benchmarks/incomplete_int4.py --vllm-python PY [--checkpoint FOLDER] [--cases ...] [--vllm-code FOLDER]

Each case is a copy in the published layout (weights linked) whose list is changed, loaded by vLLM in a process of its
own and asked about pictures. `complete`, `absent` and `lm_head` have huoyan's plugin; `alone` has the list of `lm_head`
and vLLM without what the plugin does about lists, or, with --vllm-code (the Python files of the published checkpoint),
without huoyan at all. Prints what became of each, and whether those that loaded answer alike. Takes the embedded int4
model where no other is named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT), str(ROOT / "src")]
LISTS: dict[str, list[str] | None] = {
    "complete": ["vpm", "resampler", "lm_head"], "absent": None, "lm_head": ["lm_head"], "alone": ["lm_head"],
}  # fmt: skip
QUESTIONS = (("What is in this picture?", "airplane.jpg"), ("What does the sign say?", "sign.jpg"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--vllm-code", type=Path)
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "src" / "huoyan" / "tiny" / "checkpoint-int4"
    )
    parser.add_argument("--cases", default=",".join(LISTS))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("incomplete_int4"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="incomplete-") as temporary:
        for case in given.cases.split(","):
            found[case] = run(case, given, Path(temporary) / case)
            (given.out / "incomplete_int4.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
            show(case, found[case])
    loaded = {name: each["answers"] for name, each in found.items() if "answers" in each}
    alike = all(answers == next(iter(loaded.values())) for answers in loaded.values())
    print(f"{len(loaded)} of {len(found)} loaded; their answers are {'equal' if alike else 'NOT equal'}")
    return int(not alike or any("answers" not in found[case] for case in found if case != "alone"))


def run(case: str, given: argparse.Namespace, root: Path) -> dict[str, Any]:
    """What tests/vllm_plugin/in_vllm.py says of the case; `error` where vLLM did not load it."""
    from tests.peer.environment import with_plugin, without_plugin
    from tests.vllm_plugin.published import publish

    from vs_vllm import published

    root.mkdir()
    quantization = json.loads((given.checkpoint / "config.json").read_text())["quantization_config"]
    quantization.pop("modules_to_not_convert", None)
    if LISTS[case] is not None:
        quantization["modules_to_not_convert"] = LISTS[case]
    without = case == "alone" and given.vllm_code is not None
    if without:
        folder = published(
            given.checkpoint, root / "model", given.vllm_code, quantization_config=quantization
        )
    else:
        folder = publish(given.checkpoint, root / "model", quantization_config=quantization)
    media = ROOT / "src" / "huoyan" / "tiny" / "media"
    requests = [
        {"question": question, "pictures": [str(media / picture)], "max_tokens": given.tokens}
        for question, picture in QUESTIONS
    ]
    model = {
        "folder": str(folder), "dtype": "float16", "requests": requests, "trust": without,
        "forget": case == "alone" and not without,
    }  # fmt: skip
    jobs, out, log = root / "jobs.json", root / "found.json", given.out / f"{case}.log"
    jobs.write_text(json.dumps({"configs": {}, "models": {case: model}}))
    command = [given.vllm_python, str(ROOT / "tests" / "vllm_plugin" / "in_vllm.py"), str(jobs), str(out)]
    environment = without_plugin() if without else with_plugin(root / "site")
    begun = time.perf_counter()
    with log.open("w") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    took = time.perf_counter() - begun
    what = {"modules_to_not_convert": LISTS[case], "plugin": not without, "seconds": took}
    models = json.loads(out.read_text())["models"] if out.exists() else {}
    return what | models.get(case, {"error": f"the process ended: see {log}"})


def show(case: str, found: dict[str, Any]) -> None:
    who = "the plugin" if found["plugin"] and case != "alone" else "vLLM alone"
    print(f"{case} (list {found['modules_to_not_convert']}, {who}): ", end="")
    if "error" in found:
        print(f"does not load: {found['error'][:400]}", flush=True)
        return
    answers = " | ".join(repr(answer.get("text", answer.get("error"))[:60]) for answer in found["answers"])
    print(f"loads and answers in {found['seconds']:.0f} s: {answers}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
