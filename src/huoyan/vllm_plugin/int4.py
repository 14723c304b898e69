"""Int4 checkpoints whose `quantization_config` does not name all that stays in 16 bits (vllm-project/vllm#11128).

vLLM reads every linear layer as int4 that the list there does not leave out, and dies at a vision tower that is
not. Which modules are int4 is read from the names of the tensors, without the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huoyan.models.checkpoint import weight_files
from huoyan.models.int4_formats import is_int4
from huoyan.models.safetensors_header import read_header


def complete_quantization_config(fields: dict[str, Any], model: str, revision: str | None = None) -> None:
    """Name in `fields["quantization_config"]` what the checkpoint has in 16 bits, and nothing that is int4.

    AWQ has `modules_to_not_convert`, compressed-tensors `ignore`; GPTQ names what is int4, and vLLM reads that
    from the tensors itself. Nothing changes where no tensor is known (a folder without weights) or none is int4.

    Args:
        fields: the contents of `config.json`; changed in place.
        model: folder or hub name.

    Raises:
        ModelError: a weight file of the folder is missing or cut short.
    """
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, dict):
        return
    complete = {"awq": _complete_awq, "compressed-tensors": _complete_compressed_tensors}.get(
        str(quantization.get("quant_method")).lower()
    )
    if complete is None:
        return
    shapes = _shapes(model, revision)
    if any(map(is_int4, shapes)):
        fields["quantization_config"] = {**quantization, **complete(quantization, shapes)}


def plain_modules(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The matrices that are not int4, by the shortest names that no int4 one contains: `vpm` for a vision tower.

    Args:
        shapes: of all tensors, by name.
    """
    int4 = int4_modules(shapes)
    plain = {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    return sorted({_shortest(module, int4) for module in plain - int4})


def int4_modules(shapes: Mapping[str, Sequence[int]]) -> set[str]:
    """The matrices that are int4."""
    return {name.rpartition(".")[0] for name in shapes if is_int4(name)}


def _shapes(model: str, revision: str | None) -> dict[str, tuple[int, ...]]:
    """Of all tensors, by name."""
    folder = Path(model)
    if folder.is_dir():
        return {info.name: info.shape for file in weight_files(folder) for info in read_header(file)}
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    headers = get_safetensors_params_metadata(model, revision=revision)
    return {name: tuple(entry["shape"]) for name, entry in headers.items() if "shape" in entry}


def _complete_awq(given: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """vLLM looks for each entry anywhere in a layer's name."""
    int4 = int4_modules(shapes)
    listed = {str(entry) for entry in given.get("modules_to_not_convert") or ()}
    kept = {entry for entry in listed if not any(entry in module for module in int4)}
    return {"modules_to_not_convert": sorted(kept.union(plain_modules(shapes)))}


def _complete_compressed_tensors(
    given: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """An entry is a layer's whole name, or `re:` and an expression that matches its beginning."""
    int4 = int4_modules(shapes)
    kept = [entry for entry in given.get("ignore") or () if entry not in int4]
    plain = (f"re:{re.escape(module)}(\\.|$)" for module in plain_modules(shapes))
    return {"ignore": [*kept, *(entry for entry in plain if entry not in kept)]}


def _shortest(module: str, int4: set[str]) -> str:
    parts = module.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end])
        # vLLM's AWQ looks anywhere in a name: `layers.1` would also mean `layers.11`.
        if not any(prefix in name for name in int4):
            return prefix
    return module
