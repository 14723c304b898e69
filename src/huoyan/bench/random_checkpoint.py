"""Checkpoints with random weights, in the published layout: to measure speed and memory, to compare engines.

    python -m huoyan.bench.random_checkpoint FOLDER --shape full --dtype bfloat16

The weights are made and written shard by shard, so the full 16 GB need no more memory than two shards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from huoyan.bench.checkpoint_shapes import (
    PATCH,
    SHAPES,
    CheckpointShape,
    check_shape,
    config_of,
    shape_of,
    usual_dtype,
)
from huoyan.bench.text_files import train_tokenizer, write_json, write_text_files
from huoyan.errors import HuoyanError, InputError
from huoyan.layers.linear import Linear
from huoyan.models.checkpoint import INDEX, SINGLE
from huoyan.models.config import ModelConfig, parse_model_config
from huoyan.models.int4_formats import AWQ_ORDER, pack_nibbles
from huoyan.models.layout import Source, sources
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.weights import DTYPES, random_parameter

SHARD_BYTES = 2_000_000_000
Progress = Callable[[int, int], None]
"""Called with (bytes written so far, bytes in all)."""


def write_random_checkpoint(
    folder: str | Path,
    shape: str | CheckpointShape = "small",
    *,
    seed: int = 0,
    dtype: str | torch.dtype = torch.bfloat16,
    quantization: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Write a whole checkpoint folder: configs, tokenizer, weights in shards with an index.

    The weights have the scale of trained ones (activations stay near 1, logits spread), norms and biases
    differ from 1 and 0. The same seed on the same kind of device gives the same files.

    Args:
        folder: a new or empty folder. `config.json` is written last, so an interrupted one is not taken
            for a checkpoint.
        shape: a name of `SHAPES`, or sizes of your own.
        quantization: "awq" makes every linear map of the decoder's layers int4, as AutoAWQ (GEMM) packs it.
        device: where the random numbers are drawn; a GPU is some fifty times faster.

    Raises:
        InputError: a wrong name, or sizes that do not fit each other.
    """
    folder = Path(folder)
    sizes = shape_of(shape)
    wanted = _dtype(dtype)
    if quantization not in (None, "awq"):
        raise InputError(f"quantization {quantization!r} is unknown: use awq, or none")
    if shard_bytes < 1:
        raise InputError(f"shard_bytes must be at least 1 (got {shard_bytes})")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already: give a new folder, or remove it first")
    check_shape(sizes, quantization)
    config = _write_settings(folder, sizes, wanted, quantization, seed)
    model_config = parse_model_config(config)
    group_size = sizes.group_size if quantization else None
    tensors = _tensors(model_config, wanted, torch.device(device), seed, group_size)
    _write_shards(folder, tensors, shard_bytes, progress, _total_bytes(model_config, wanted, group_size))
    write_json(folder / "config.json", config)
    return folder


def write_weightless_checkpoint(
    folder: str | Path, shape: str | CheckpointShape, *, quantization: str | None = None, seed: int = 0
) -> Path:
    """The same folder without weights, for `load_format="dummy"`, which makes them up on the device."""
    folder, sizes = Path(folder), shape_of(shape)
    check_shape(sizes, quantization)
    dtype = DTYPES[usual_dtype(quantization)]
    write_json(folder / "config.json", _write_settings(folder, sizes, dtype, quantization, seed))
    return folder


def _write_settings(
    folder: Path, sizes: CheckpointShape, dtype: torch.dtype, quantization: str | None, seed: int
) -> dict[str, Any]:
    """Write everything but the weights and `config.json`, whose contents are returned."""
    tokenizer = train_tokenizer(sizes.vocab_size, seed=seed)
    config = config_of(sizes, str(dtype).removeprefix("torch."), quantization)
    config |= {
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    parse_model_config(config)
    pictures = {
        "max_slice_nums": sizes.max_slice_nums,
        "scale_resolution": sizes.scale_resolution,
        "patch_size": PATCH,
        "image_feature_size": sizes.query_num,
    }
    write_text_files(folder, tokenizer, pictures=pictures)
    return config


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown: use float32, float16 or bfloat16")
    return DTYPES[name]


def _skeleton(config: ModelConfig) -> MiniCPMV:
    with torch.device("meta"):
        return MiniCPMV(config)


def _plan(
    config: ModelConfig, group_size: int | None
) -> Iterator[tuple[Source, Tensor, tuple[int, ...], bool]]:
    """Each parameter: its published parts, its shape (a meta tensor), rows a part, whether it is int4."""
    model = _skeleton(config)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for source in sources(parameters):
        value = parameters[source.target]
        owner = modules[source.target.rpartition(".")[0]]
        rows = owner.splits if isinstance(owner, Linear) else (value.shape[0],)
        int4 = (
            group_size is not None
            and isinstance(owner, Linear)
            and source.target.startswith("llm.model.layers.")
            and source.target.endswith(".weight")
        )
        yield source, value, tuple(rows), int4


def _tensors(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int, group_size: int | None
) -> Iterator[tuple[str, Tensor]]:
    """Published names and tensors on the CPU, one parameter at a time, in the order of the model."""
    generator = torch.Generator(device=device).manual_seed(seed)
    kernel = (config.vision.num_channels, config.vision.patch_size, config.vision.patch_size)
    for source, value, rows, int4 in _plan(config, group_size):
        if int4:
            assert group_size is not None
            for part, row in zip(source.parts, rows, strict=True):
                matrix = part.removesuffix(".weight")
                made = _random_awq(row, value.shape[1], group_size, device, generator)
                yield from ((f"{matrix}.{suffix}", tensor) for suffix, tensor in made.items())
            continue
        whole = random_parameter(source.target, value.shape, dtype, device, generator)
        if whole.dim() == 1:
            # A norm that is all ones would hide that it is left out.
            whole += 0.1 * torch.randn(whole.shape, generator=generator, device=device)
        whole = whole.cpu()
        if source.target == "vpm.embeddings.patch_embedding.weight":
            whole = whole.unflatten(1, kernel)
        # A tensor of its own for each part: views would be written with all of their storage.
        yield from (
            (part, piece.clone()) for part, piece in zip(source.parts, whole.split(rows), strict=True)
        )


def _random_awq(
    rows: int, columns: int, group_size: int, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    """A [rows, columns] matrix in AutoAWQ's GEMM layout, its values spread as `random_parameter` spreads them."""
    groups = columns // group_size
    words = torch.randint(
        -(2**31), 2**31, (columns, rows // 8), dtype=torch.int64, generator=generator, device=device
    )
    zeros = torch.randint(6, 10, (groups, rows), dtype=torch.uint8, generator=generator, device=device)
    spread = 0.75 + 0.5 * torch.rand((groups, rows), generator=generator, device=device)
    step = columns**-0.5 / _NIBBLE_DEVIATION
    return {
        "qweight": words.to(torch.int32).cpu(),
        "qzeros": pack_nibbles(zeros.cpu(), AWQ_ORDER),
        "scales": (spread * step).to(torch.float16).cpu(),
    }


_NIBBLE_DEVIATION = 4.61
"""Standard deviation of whole numbers spread evenly over 0 to 15."""


def _total_bytes(config: ModelConfig, dtype: torch.dtype, group_size: int | None) -> int:
    total = 0
    for _, value, _, int4 in _plan(config, group_size):
        if int4:
            assert group_size is not None
            groups = value.numel() // group_size
            total += value.numel() // 2 + groups // 2 + groups * 2
        else:
            total += value.numel() * dtype.itemsize
    return total


def _write_shards(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    shard_bytes: int,
    progress: Progress | None,
    total: int,
) -> None:
    """Shards of at most `shard_bytes` (or one tensor), named when their number is known, and the index."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = written = 0

    def flush() -> None:
        nonlocal held, size, written
        save_file(held, folder / f"{len(shards)}.partial", metadata={"format": "pt"})
        shards.append(list(held))
        written += size
        held, size = {}, 0
        if progress is not None:
            progress(written, total)

    for name, value in tensors:
        if held and size + value.nbytes > shard_bytes:
            flush()
        held[name] = value.contiguous()
        size += value.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.partial").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(folder / INDEX, {"metadata": {"total_size": written}, "weight_map": weight_map})


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m huoyan.bench.random_checkpoint", description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--shape", default="small", choices=list(SHAPES), help="full is the published 8 B")
    parser.add_argument("--layers", type=int, help="decoder layers, where fewer are enough")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (bfloat16; float16 with awq)")
    parser.add_argument("--quantization", choices=["awq"], help="int4 decoder layers, as AutoAWQ writes them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="bytes of a weight file at most")
    parser.add_argument("--device", default="cpu", help="where random numbers are drawn: cpu or cuda")
    given = parser.parse_args(arguments)
    shape = SHAPES[given.shape]
    if given.layers is not None:
        shape = replace(shape, num_hidden_layers=given.layers)

    def report(done: int, of: int) -> None:
        print(f"{done / 1e6:,.0f} of {of / 1e6:,.0f} MB written", file=sys.stderr)

    try:
        write_random_checkpoint(
            given.folder,
            shape,
            seed=given.seed,
            dtype=given.dtype or ("float16" if given.quantization else "bfloat16"),
            quantization=given.quantization,
            shard_bytes=given.shard_bytes,
            device=given.device,
            progress=report,
        )
    except HuoyanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
