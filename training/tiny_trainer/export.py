"""Writing a checkpoint folder in the published layout, whole or not at all."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import torch

from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.weights import save_published
from tiny_trainer.shape import write_configs


def export(model: MiniCPMV, tokenizer_folder: Path, folder: Path) -> None:
    """Replace `folder` by a checkpoint of `model` in bfloat16 with the tokenizer's files."""
    fresh = folder.with_name(folder.name + ".new")
    if fresh.exists():
        shutil.rmtree(fresh)
    shutil.copytree(tokenizer_folder, fresh)
    write_configs(fresh)
    save_published(model, fresh, dtype=torch.bfloat16)
    if folder.exists():
        shutil.rmtree(folder)
    fresh.rename(folder)


def pack(folder: Path, file: Path) -> None:
    """Put a checkpoint folder into one uncompressed tar file."""
    fresh = file.with_name(file.name + ".new")
    with tarfile.open(fresh, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=f"{folder.name}/{path.name}")
    fresh.replace(file)
