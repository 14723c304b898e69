"""vLLM and huoyan one after the other on one device, with the same checkpoint and the same work.

usage: python benchmarks/vs_vllm.py --vllm-python PY [--formats bf16,int4] [--rows ...] [--out DIR]
       python benchmarks/vs_vllm.py --only huoyan --formats int4 --resume --out DIR      # a part of it

A random checkpoint is written once a format (or taken from --checkpoint, --checkpoint-int4); each engine reads it in
a process of its own, is warmed up, and does the rows of `vs_vllm_rows.py`. vLLM gets the model by huoyan's plugin, or,
with --vllm-code FOLDER, is alone and runs the published checkpoint's Python files that are in that folder.

Each number is written to DIR when it is there. Parts that ran separately are joined: what DIR holds of the other
engine and format is in the table too (`vs_vllm_report.py DIR` prints it again). On a machine without a GPU it runs at
toy sizes, which tells that it works and nothing else. Rows that failed are in the JSON with their reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]
from vs_vllm_report import collect, draw, print_table, ratios  # noqa: E402
from vs_vllm_rows import FULL, ROWS, TOY  # noqa: E402

ENGINES = ("vllm", "huoyan")
AUTO_MAPS = {
    "config.json": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig"},
    "preprocessor_config.json": {
        "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
        "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", default=sys.executable, help="python of vLLM's environment")
    parser.add_argument("--vllm-code", type=Path, help="run vLLM alone, with these files of the checkpoint")
    parser.add_argument("--only", choices=ENGINES, help="one engine's part")
    parser.add_argument("--resume", action="store_true", help="leave out the rows that --out has already")
    parser.add_argument("--shape", default="full", help="of the random checkpoint: full or small")
    parser.add_argument("--formats", default="bf16,int4")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--checkpoint", type=Path, help="a folder in 16 bits, instead of a random one")
    parser.add_argument("--checkpoint-int4", type=Path)
    parser.add_argument(
        "--dummy", action="store_true", help="each engine makes its weights up; no file is read"
    )
    parser.add_argument("--toy", action="store_true", help="toy sizes, as on a machine without a GPU")
    parser.add_argument("--cap-gib", type=float, default=24, help="of the memory row")
    parser.add_argument("--out", type=Path, default=Path("vs_vllm"))
    parser.add_argument("--seconds", type=float, default=6000, help="the whole run at most")
    given = parser.parse_args()
    unknown = set(given.rows.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"no row {sorted(unknown)[0]!r}: there are {', '.join(ROWS)}")
    signal.signal(signal.SIGTERM, _ended)
    return run(given, time.time() + given.seconds)


def _ended(number: int, _: FrameType | None) -> None:
    """As Ctrl-C does, so that the engine's processes are ended with this one."""
    raise KeyboardInterrupt


def run(given: argparse.Namespace, deadline: float) -> int:
    given.out.mkdir(parents=True, exist_ok=True)
    cuda = has_cuda()
    toy = given.toy or not cuda
    engines = (given.only,) if given.only else ENGINES
    rows = given.rows.split(",")
    if not cuda and "memory" in rows:
        rows.remove("memory")
    with tempfile.TemporaryDirectory(prefix="vs-vllm-") as temporary:
        for form in given.formats.split(","):
            folder = given.checkpoint if form == "bf16" else given.checkpoint_int4
            folder = folder or write_checkpoint(Path(temporary) / form, given, form, cuda)
            for engine in engines:
                read_once(folder)
                alone = engine == "vllm" and given.vllm_code is not None
                # Where it is the same in every run, as vLLM keeps what it compiled by that.
                used = published(folder, given.out / f"{form}-alone", given.vllm_code) if alone else folder
                job = {
                    "engine": engine, "form": form, "folder": str(used), "cuda": cuda, "toy": toy,
                    "shape": given.shape, "dummy": given.dummy, "alone": alone, "cap_gib": given.cap_gib,
                    "sizes": asdict(TOY if toy else FULL),
                }  # fmt: skip
                # The row `memory` has the card to itself, in a process of its own.
                for part, of_part in (
                    ("", [row for row in rows if row != "memory"]),
                    ("-memory", ["memory"]),
                ):
                    if set(of_part) & set(rows):
                        out = given.out / f"{engine}-{form}{part}.json"
                        run_engine(given, {**job, "rows": of_part, "out": str(out)}, deadline)
    found = collect(given.out)
    report = {"formats": found, "ratios": ratios(found)}
    (given.out / "vs_vllm.json").write_text(json.dumps(report, indent=1))
    print_table(found)
    if toy:
        print("\ntoy sizes: these numbers say that the script works, not which engine is the faster")
    draw(found, given.out / "vs_vllm.png")
    wanted = [found.get(form, {}).get(engine) for form in given.formats.split(",") for engine in engines]
    return int(any(part is None or not part["values"] for part in wanted))


def has_cuda() -> bool:
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def own_environment() -> dict[str, str]:
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def vllm_environment(alone: bool, folder: Path) -> dict[str, str]:
    """Alone, or with huoyan as it is when installed beside vLLM (`folder` gets what says so)."""
    from tests.peer.environment import with_plugin, without_plugin

    # Its log tells the sizes of its cache.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    return without_plugin() if alone else with_plugin(folder)


def write_checkpoint(folder: Path, given: argparse.Namespace, form: str, cuda: bool) -> Path:
    """In a process of its own, so that nothing of it stays on the device."""
    awq = form == "int4"
    if given.dummy:
        code = "import sys; from huoyan.bench.random_checkpoint import write_weightless_checkpoint as write; "
        code += "write(sys.argv[1], sys.argv[2], quantization=sys.argv[3] or None)"
        command = [sys.executable, "-c", code, str(folder), given.shape, "awq" if awq else ""]
    else:
        command = [sys.executable, "-m", "huoyan.bench.random_checkpoint", str(folder)]
        command += ["--shape", given.shape, "--device", "cuda" if cuda else "cpu"]
        command += ["--quantization", "awq"] if awq else []
    subprocess.run(command, check=True, env=own_environment(), stdout=subprocess.DEVNULL)
    return folder


def published(source: Path, folder: Path, code: Path, **config: Any) -> Path:
    """A copy, its weights linked, that names the Python files in `code` as published checkpoints do.

    `config` changes fields of `config.json`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name in AUTO_MAPS:
            fields = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": AUTO_MAPS[path.name]}
            fields |= config if path.name == "config.json" else {}
            (folder / path.name).write_text(json.dumps(fields, indent=1), encoding="utf-8")
        elif path.is_file():
            (folder / path.name).symlink_to(path.resolve())
    for path in code.glob("*.py"):
        shutil.copy(path, folder / path.name)
    return folder


def read_once(folder: Path) -> None:
    """Both engines start with the weights in the page cache."""
    buffer = bytearray(1 << 25)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def run_engine(given: argparse.Namespace, job: dict[str, Any], deadline: float) -> None:
    """One engine's process: it writes after every number, so what it found is there even where it ended badly."""
    out = Path(job["out"])
    if not given.resume:
        out.unlink(missing_ok=True)
    log, job_file = out.with_suffix(".log"), out.with_suffix(".job")
    python, environment = sys.executable, own_environment()
    if job["engine"] == "vllm":
        python = given.vllm_python
        environment = vllm_environment(job["alone"], given.out / "plugin")
    print(f"{job['engine']}, {job['form']}, {', '.join(job['rows'])} (log: {log})", flush=True)
    job_file.write_text(json.dumps({**job, "begun": time.time()}))
    reason = ""
    with log.open("a") as file:
        # A group of its own: vLLM's engine is a process of its process, and keeps the card if it is not ended too.
        process = subprocess.Popen(
            [python, str(HERE.with_name("vs_vllm_rows.py")), str(job_file)],
            stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            ended = process.wait(max(deadline - time.time(), 1))
            reason = f"it ended with {ended}" if ended else ""
        except subprocess.TimeoutExpired:
            reason = f"the time of this run was over ({given.seconds:g} s)"
        finally:
            end_group(process)
    if reason:
        add_failure(out, job, f"{reason}: see {log}")
        print(f"  {job['engine']}: {reason}; its log ends with", *_last_lines(log), sep="\n  ", flush=True)
    if out.exists():
        for name, value in json.loads(out.read_text())["values"].items():
            print(f"  {name:36} {value:12.2f}", flush=True)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """What is left of it: after a good end nothing, but for a moment."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    process.wait()


def _last_lines(log: Path) -> list[str]:
    return [line[-300:] for line in log.read_text(errors="replace").splitlines()[-8:]]


def add_failure(out: Path, job: dict[str, Any], reason: str) -> None:
    from vs_vllm_rows import new_results

    results = json.loads(out.read_text()) if out.exists() else new_results(job)
    results["failed"]["the process"] = reason
    out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(main())
