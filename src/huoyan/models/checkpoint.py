"""A checkpoint folder in the published layout: its sizes and the tensors it has, without reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huoyan.errors import ModelError
from huoyan.models.config import ModelConfig, read_json, read_model_config
from huoyan.models.safetensors_header import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` maps published names to where they are; empty for a folder without weights."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def num_parameters(self) -> int:
        """Scalars of all tensors; int4 words count as the eight values they hold."""
        total = 0
        for info in self.tensors.values():
            count = 1
            for side in info.shape:
                count *= side
            total += count * (8 if info.name.endswith(("qweight", "weight_packed")) else 1)
        return total


def open_checkpoint(folder: str | Path, *, need_weights: bool = True) -> Checkpoint:
    """Read the config and the headers of all weight files of `folder`.

    Args:
        need_weights: False allows a folder without weight files (random weights are made up for it).

    Raises:
        ModelError: one line that names the file and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: give a checkpoint folder, a hub name or 'tiny'")
    config = read_model_config(folder)
    files = weight_files(folder)
    if not files:
        if need_weights:
            raise ModelError(_no_weights_message(folder))
        return Checkpoint(folder, config, {})
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_header(file):
            if info.name in tensors:
                raise ModelError(
                    f"{info.name} is in both {tensors[info.name].file.name} and {file.name} of {folder}: "
                    "remove the stale file"
                )
            tensors[info.name] = info
    return Checkpoint(folder, config, tensors)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the weights, from the index where there is one."""
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map: download it again")
        names = sorted(set(map(str, weight_map.values())))
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{index} names files outside of its folder: refusing to read them")
        return [folder / name for name in names]
    single = folder / SINGLE
    if single.exists():
        return [single]
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        raise ModelError(f"{folder} has weight shards but no {INDEX}: the download is incomplete; resume it")
    return []


def _no_weights_message(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return (
            f"{folder} has only pickled weights (*.bin), which can run code when read: "
            "convert them to safetensors or download a safetensors revision"
        )
    if any(folder.glob("*.incomplete")) or any(folder.glob("*.safetensors*")):
        return f"{folder} has no complete safetensors weights: the download is incomplete; resume it"
    return f"{folder} has no safetensors weights: it is not a complete checkpoint; download it again"
