"""The float32 weights of an unfinished training, in files small enough to be carried about.

Moments are left out: they are of the last few dozen steps, and come back within the steps it takes the rate to rise.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tiny_trainer.optimizer import Optimizer

_SHARD_NUMBERS = 3_600_000


def save_state(optimizer: Optimizer, folder: Path, progress: float) -> None:
    """`folder`/state-0.safetensors and so on, each below 15 MB."""
    flat = torch.cat([m.flatten() for m in optimizer.masters]).cpu()
    for i, shard in enumerate(flat.split(_SHARD_NUMBERS)):
        fresh = folder / f"state-{i}.safetensors.new"
        about = {"numbers": str(len(flat)), "progress": json.dumps(progress)}
        save_file({"weights": shard.contiguous()}, fresh, metadata=about)
        fresh.replace(folder / f"state-{i}.safetensors")


@torch.no_grad()
def load_state(optimizer: Optimizer, folder: Path) -> float:
    """Put saved weights into the masters, their averages and the model; the progress they were saved at."""
    files = sorted(folder.glob("state-*.safetensors"))
    expected = sum(m.numel() for m in optimizer.masters)
    flat = torch.cat([load_file(file)["weights"] for file in files]) if files else torch.zeros(0)
    if len(flat) != expected:
        raise SystemExit(f"{folder} holds {len(flat)} weights in state-*.safetensors, not {expected}")
    reached = {_progress(file) for file in files}
    if len(reached) > 1:
        raise SystemExit(f"state-*.safetensors in {folder} are of different moments: {sorted(reached)}")
    (progress,) = reached
    for master, part in zip(
        optimizer.masters, flat.split([m.numel() for m in optimizer.masters]), strict=True
    ):
        master.copy_(part.view_as(master))
    torch._foreach_copy_(optimizer.averages, optimizer.masters)
    optimizer.show_masters()
    return progress


def _progress(file: Path) -> float:
    with safe_open(file, framework="pt") as opened:
        return float(json.loads(opened.metadata()["progress"]))
