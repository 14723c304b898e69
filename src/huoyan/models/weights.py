"""Weights between the published safetensors layout and our modules, straight to device and dtype."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from huoyan.errors import InputError, ModelError
from huoyan.layers.int4 import Int4Linear, Int4Weight, stack
from huoyan.layers.linear import Linear
from huoyan.models.checkpoint import INDEX, SINGLE, Checkpoint
from huoyan.models.config import ModelConfig, read_json
from huoyan.models.int4_formats import quantized_parts, read_int4, refuse_other_formats
from huoyan.models.int8_tables import (
    CONFIG_KEY,
    EMBEDDING,
    HEAD,
    TABLES,
    int8_tables,
    put_tables,
    random_table,
    read_int8,
)
from huoyan.models.layout import IGNORED, Source, sources
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.tensor_reader import TensorReader

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in all)."""

DTYPES = {
    "float32": torch.float32, "float": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "half": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
_SMALL = 1_000_000_000


def resolve_dtype(requested: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype to compute in: "auto" is the checkpoint's own, but float32 for small models on a CPU.

    Raises:
        InputError: an unknown name.
    """
    if isinstance(requested, torch.dtype):
        requested = str(requested).removeprefix("torch.")
    if requested == "auto":
        if device.type == "cpu":
            return torch.float32 if checkpoint.num_parameters < _SMALL else torch.bfloat16
        requested = checkpoint.config.dtype
    if requested not in DTYPES:
        raise InputError(f"dtype {requested!r} is unknown: use auto, float32, float16 or bfloat16")
    return DTYPES[requested]


def load_model(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    load_format: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> MiniCPMV:
    """Build the model and fill it.

    Args:
        load_format: "auto" reads the files, "dummy" makes up random weights of a sane scale.
        progress: told how many bytes were read of how many.

    Raises:
        ModelError: a tensor is missing, unexpected or of the wrong shape.
    """
    device = torch.device(device)
    wanted = resolve_dtype(dtype, checkpoint, device)
    with torch.device("meta"):
        model = MiniCPMV(checkpoint.config)
    rules_path = checkpoint.folder / "preprocessor_config.json"
    if rules_path.exists():
        rules = read_json(rules_path)
        model.norm_mean = tuple(rules.get("norm_mean", model.norm_mean))
        model.norm_std = tuple(rules.get("norm_std", model.norm_std))
    if load_format == "dummy":
        _fill_dummy(model, checkpoint, device, wanted, seed)
    elif load_format == "auto":
        _fill_from_files(model, checkpoint, device, wanted, progress)
    else:
        raise InputError(f"load_format {load_format!r} is unknown: use auto or dummy")
    model.eval()
    return model.requires_grad_(False)


def _fill_from_files(
    model: MiniCPMV,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = checkpoint.config.text.tie_word_embeddings
    if tied:
        shapes.pop("llm.lm_head.weight")
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    int8 = int8_tables(dtypes)
    refuse_other_formats(
        {name: kind for name, kind in dtypes.items() if name.removesuffix(".weight") not in int8},
        checkpoint.config.quantization,
    )
    int4 = int4_matrices(model, checkpoint)
    quantized = {*int4, *(f"{table}.weight" for table in int8)}
    plan = [source for source in sources(shapes) if source.target not in quantized]
    parts_read = {part for parts in int4.values() for part in flat(parts)} | {*flat(int8)}
    check_tensors(checkpoint, plan, shapes, model, parts_read)
    plan.sort(key=lambda source: str(checkpoint.tensors[source.parts[0]].file))

    with TensorReader(checkpoint.tensors) as reader:

        def read(name: str) -> Tensor:
            # A GPU takes int4 apart and packs it anew twenty times as fast.
            return reader.read(name).to(device) if device.type == "cuda" else reader.read(name)

        def report() -> None:
            if progress is not None:
                progress(min(reader.bytes_read, checkpoint.nbytes), checkpoint.nbytes)

        for source in plan:
            set_parameter(
                model, source.target, read_dense(reader, source, shapes[source.target], dtype, device)
            )
            report()
        for target, parts in int4.items():
            module = target.removesuffix(".weight")
            dense = model.get_submodule(module)
            assert isinstance(dense, Linear)
            shape_of = zip(parts.items(), dense.splits, strict=True)
            weight = stack(
                [
                    read_int4(read, names, matrix, (rows, dense.width_in), checkpoint.config.quantization)
                    for (matrix, names), rows in shape_of
                ]
            )
            owner, _, leaf = module.rpartition(".")
            replacement = Int4Linear(weight, dense.bias, dtype=dtype, device=device, gated=dense.gates)
            setattr(model.get_submodule(owner), leaf, replacement)
            report()
        tables = {}
        for table, names in int8.items():
            tables[table] = read_int8(reader.read, names, shapes[f"{table}.weight"]).to(device)
            report()
        put_tables(model, tables, dtype, tied)
    if tied and EMBEDDING not in int8:
        set_parameter(model, "llm.lm_head.weight", model.get_parameter("llm.model.embed_tokens.weight"))


def read_dense(
    reader: TensorReader, source: Source, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One parameter, its published parts stacked, in the dtype and on the device wanted."""
    whole = torch.empty(shape, dtype=dtype, device=device)
    row = 0
    for part in source.parts:
        value = reader.read(part)
        whole[row : row + value.shape[0]].copy_(value.reshape(value.shape[0], *whole.shape[1:]))
        row += value.shape[0]
    return whole


def load_part(
    module: nn.Module, prefix: str, reader: TensorReader, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill `module` (on the meta device), which the whole model calls `prefix`, with dense weights."""
    for name, parameter in list(module.named_parameters()):
        (source,) = sources([f"{prefix}.{name}"])
        set_parameter(module, name, read_dense(reader, source, tuple(parameter.shape), dtype, device))


def int4_matrices(model: MiniCPMV, checkpoint: Checkpoint) -> dict[str, dict[str, tuple[str, ...]]]:
    """Which of the model's linear maps the checkpoint holds in int4.

    Returns:
        for each such parameter of ours, the published matrices stacked in it and the tensors of each.

    Raises:
        ModelError: some of the matrices that are stacked in one are in int4 and some are not.
    """
    names = set(checkpoint.tensors)
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        (source,) = sources([f"{module_name}.weight"])
        matrices = [part.removesuffix(".weight") for part in source.parts]
        parts = {matrix: quantized_parts(names, matrix) for matrix in matrices}
        if all(parts.values()):
            found[source.target] = parts
        elif any(parts.values()):
            dense = next(matrix for matrix, tensors in parts.items() if not tensors)
            raise ModelError(f"{dense} is not in int4 while its neighbours are: quantize them together")
    return found


def flat(parts: Mapping[str, tuple[str, ...]]) -> list[str]:
    """All tensor names of some quantized matrices."""
    return [name for names in parts.values() for name in names]


def check_tensors(
    checkpoint: Checkpoint,
    plan: list[Source],
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module,
    int4: set[str],
) -> None:
    """Hold the files' tensors against what the model needs, before anything is read.

    `int4` names the tensors that hold quantized matrices; they are checked when they are read.

    Raises:
        ModelError: one line with the first name of each kind of trouble and how many there are.
    """
    needed = {part: source for source in plan for part in source.parts}
    missing = sorted(needed.keys() - checkpoint.tensors.keys())
    if missing:
        raise ModelError(
            f"{checkpoint.folder} lacks {len(missing)} tensor(s), first {missing[0]}: "
            "the download is incomplete or the checkpoint is of another model"
        )
    ignored = {"llm.lm_head.weight"} if "llm.lm_head.weight" not in needed else set()
    if checkpoint.config.vision.drop_last_layer:
        last = f"vpm.encoder.layers.{checkpoint.config.vision.num_hidden_layers - 1}."
        ignored |= {name for name in checkpoint.tensors if name.startswith(last)}
    unknown = checkpoint.tensors.keys() - needed.keys() - ignored - int4
    extra = sorted(name for name in unknown if not IGNORED.search(name))
    if extra:
        raise ModelError(
            f"{checkpoint.tensors[extra[0]].file} has {len(extra)} tensor(s) this model does not, "
            f"first {extra[0]}: config.json and the weights are not of the same model"
        )
    modules = dict(model.named_modules())
    for source in plan:
        shape = shapes[source.target]
        owner = modules[source.target.rpartition(".")[0]]
        rows = owner.splits if isinstance(owner, Linear) else (shape[0],)
        for part, row in zip(source.parts, rows, strict=True):
            info = checkpoint.tensors[part]
            expected = (row, *shape[1:])
            if not _same_shape(info.shape, expected):
                raise ModelError(
                    f"{info.file}: {part} has shape {list(info.shape)} where config.json implies "
                    f"{list(expected)}: config.json and the weights are not of the same model"
                )


def _same_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Equal, or the published convolution kernel of a matrix: [out, channels, side, side]."""
    if found == expected:
        return True
    flat = 1
    for side in found[1:]:
        flat *= side
    return len(found) == 4 and (found[0], flat) == expected


def _fill_dummy(
    model: MiniCPMV, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, seed: int
) -> None:
    """Random weights of the kinds that `quantization_config` says, none of them dense first."""
    said = checkpoint.config.quantization or {}
    text = checkpoint.config.text
    int4 = _layer_matrices(model) if said.get("quant_method") == "awq" else []
    int8 = TABLES if said.get(CONFIG_KEY) == "int8" else ()
    fill_random(model, device, dtype, seed, leave={f"{name}.weight" for name in (*int4, *int8)})
    generator = torch.Generator(device=device).manual_seed(seed)
    for name in int4:
        _put_random_int4(model, name, int(said.get("group_size", 128)), dtype, generator)
    deviations = {HEAD: 2.0 * text.hidden_size**-0.5, EMBEDDING: 1.0}
    tables = {t: random_table(text.vocab_size, text.hidden_size, deviations[t], generator) for t in int8}
    put_tables(model, tables, dtype, tied=False)


def fill_random(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    leave: Set[str] = frozenset(),
) -> None:
    """Random weights scaled by fan-in, so that activations stay near 1 and logits spread.

    Norm weights are 1, biases small. The stream depends on the device, the shapes on nothing else.
    Parameters named in `leave` stay as they are.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        if name not in leave:
            set_parameter(model, name, random_parameter(name, parameter.shape, dtype, device, generator))


def random_parameter(
    name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """A random value for the parameter called `name`, of the scale that `fill_random` describes."""
    value = torch.empty(shape, dtype=dtype, device=device)
    if value.dim() == 1 and name.endswith("weight"):
        return value.fill_(1.0)
    if value.dim() == 1:
        return value.normal_(0.0, 0.02, generator=generator)
    if name.endswith(("embed_tokens.weight", "resampler.query")):
        return value.normal_(0.0, 1.0, generator=generator)
    if name.endswith("position_embedding.weight"):
        return value.normal_(0.0, 0.3, generator=generator)
    if name.endswith("lm_head.weight"):
        return value.normal_(0.0, 2.0 * shape[1] ** -0.5, generator=generator)
    return value.normal_(0.0, shape[1] ** -0.5, generator=generator)


def _layer_matrices(model: MiniCPMV) -> list[str]:
    """The names of the linear maps of the decoder's layers."""
    layers = model.llm.model.layers.named_modules(prefix="llm.model.layers")
    return [name for name, module in layers if isinstance(module, Linear)]


def quantize_randomly(model: MiniCPMV, group_size: int, seed: int) -> None:
    """Put random int4 weights of a sane scale in place of the decoder's matrices."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name in _layer_matrices(model):
        _put_random_int4(model, name, group_size, model.dtype, generator)


def _put_random_int4(
    model: MiniCPMV, name: str, group_size: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Random int4 weights of a sane scale in place of the linear map called `name`."""
    dense = model.get_submodule(name)
    assert isinstance(dense, Linear)
    rows, columns = dense.weight.shape
    shape, device = (rows, columns // group_size), generator.device
    weight = Int4Weight(
        torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8, device=device),
        torch.rand(shape, generator=generator, device=device).add_(0.5).mul_(0.2 * columns**-0.5),
        torch.full(shape, 8.0, device=device),
    )
    owner, _, leaf = name.rpartition(".")
    layer = Int4Linear(weight, dense.bias, dtype=dtype, device=device, gated=dense.gates)
    setattr(model.get_submodule(owner), leaf, layer)


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` in place of the parameter called `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def published_state(model: MiniCPMV) -> dict[str, Tensor]:
    """The model's tensors under their published names and shapes (views where possible)."""
    state: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    vision = model.config.vision
    for source in sources(name for name, _ in model.named_parameters()):
        value = model.get_parameter(source.target).detach()
        owner = modules[source.target.rpartition(".")[0]]
        if len(source.parts) == 1:
            state[source.parts[0]] = value
        else:
            assert isinstance(owner, Linear)
            state.update(zip(source.parts, value.split(owner.splits), strict=True))
    kernel = "vpm.embeddings.patch_embedding.weight"
    side = vision.patch_size
    state[kernel] = state[kernel].reshape(vision.hidden_size, vision.num_channels, side, side)
    if model.config.text.tie_word_embeddings:
        state.pop("llm.lm_head.weight")
    return state


def save_published(
    model: MiniCPMV,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the weights as the published checkpoints have them: shards and an index.

    Only the weight files are written; `config.json` and the rest are the caller's.
    """
    state = {n: v.to("cpu", dtype).contiguous() for n, v in sorted(published_state(model).items())}
    write_shards(state, Path(folder), shard_bytes)


def write_shards(state: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write `state` as one file, or as shards of at most `shard_bytes` with an index."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, value in state.items():
        size = value.numel() * value.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = value
        room -= size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(v.numel() * v.element_size() for v in state.values())
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def build_model(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> MiniCPMV:
    """A model of these sizes with random weights, on the CPU (for tests and training)."""
    with torch.device("meta"):
        model = MiniCPMV(config)
    fill_random(model, torch.device("cpu"), dtype, seed)
    return model
