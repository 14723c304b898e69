"""Quantize a checkpoint's language model to int4, a layer at a time, and say what it cost."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from huoyan.errors import CapacityError, InputError, ModelError
from huoyan.layers.int4 import Int4Weight
from huoyan.layers.int8 import Int8Embedding, Int8Linear, Int8Weight, round_to_int8
from huoyan.models.checkpoint import Checkpoint, open_checkpoint
from huoyan.models.config import awq_config, read_json
from huoyan.models.hub import resolve_model
from huoyan.models.int4_formats import AWQ_ORDER, is_int4, pack_nibbles
from huoyan.models.int8_tables import CONFIG_KEY, HEAD, TABLES
from huoyan.models.layout import sources
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.qwen2 import DecoderLayer
from huoyan.models.tensor_reader import TensorReader
from huoyan.models.weights import load_part, set_parameter
from huoyan.quantize.awq import MODULES, AwqOptions, LayerInputs, quantize_layer
from huoyan.quantize.calibration import (
    CalibrationItem,
    EncodedItem,
    embed_items,
    encode_items,
    read_calibration,
    token_weights,
)
from huoyan.quantize.writer import QuantizedWriter

GROUP_SIZES = (32, 64, 128)
HELD_OUT_EVERY = 4
"""Every fourth calibration item is not calibrated with but measured on."""
Step = Callable[[int, int, str], None]
"""Called with (layers done, layers in all, what was done)."""
Note = Callable[[str], None]
"""Called with lines worth saying: that a stopped run is gone on with, that items were too long."""


@dataclass(frozen=True)
class QuantizeReport:
    """What a run did. Perplexities and agreement are over the answers of held-out calibration items, None
    where no held-out item has an answer."""

    folder: Path
    layers: list[dict[str, Any]]
    """For each: `relative_error` of what it adds to the residual stream, `scale_exponents`, `seconds`."""
    perplexity_before: float | None
    perplexity_after: float | None
    agreement: float | None
    """Share of positions where the quantized model's likeliest token is the float model's."""
    bytes_before: int
    bytes_after: int
    seconds: float
    resumed_layers: int = 0
    """Layers that an earlier, stopped run had made."""
    int8_head: bool = False
    """Whether the head and the embedding are in eight bits, which vLLM cannot read."""


@dataclass
class _Streams:
    """Hidden states of all items, packed: as the float model has them, and as the quantized one has."""

    float_x: Tensor
    int4_x: Tensor
    lengths: list[int]
    calibrated: list[bool]
    """For each item, whether it is calibrated with (else it is held out)."""
    weights: Tensor
    """How much each token of the items that are calibrated with counts."""

    def rows(self, wanted: bool) -> Tensor:
        return torch.cat([torch.full((n,), flag == wanted) for n, flag in zip(self.lengths, self.calibrated, strict=True)])  # fmt: skip # noqa: E501


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    bits: int = 4,
    group_size: int = 128,
    method: str = "awq",
    calibration: str | Path | Sequence[CalibrationItem] | None = None,
    device: str | torch.device | None = None,
    max_tokens: int = 1024,
    clip: bool = True,
    compensate: bool = False,
    modules: str | Sequence[str] = tuple(MODULES),
    quantize_head: str | None = None,
    step: Step | None = None,
    note: Note | None = None,
) -> QuantizeReport:
    """Write `model` with its decoder's matrices in int4 to the new folder `out`.

    The layout is AutoAWQ's "GEMM", which this engine and vLLM read. Memory needed is that of one layer and the
    calibration's activations. A run that was stopped goes on where it was when called again.

    Args:
        model: a checkpoint folder, a hub name (downloaded where it is not here yet) or `tiny`.
        group_size: inputs that share a scale: 32, 64 or 128.
        method: "awq" (activation-aware scales and clipping) or "rtn" (plain rounding).
        calibration: None for the built-in set, a folder of pictures, a JSONL file, or items.
        device: where to compute; by default a CUDA device where there is one.
        max_tokens: calibration prompts longer than this are left out.
        clip: whether "awq" also shrinks the groups' ranges; with `compensate` it never does.
        compensate: rounds one input of a matrix after the other, the later ones making up for the earlier ones
            (GPTQ's update; the layout is the same), and fits the scales. Nearer to the float model, and slower.
        modules: which of "qkv", "o", "gate_up" and "down", as names or one text with commas; the rest stays
            in 16 bits.
        quantize_head: "int8" also stores the head and the embedding table in eight bits, a scale a row. vLLM
            cannot read the result; this engine does. None keeps them in 16 bits.
        step: told of the progress; `note`: told lines worth saying.

    Raises:
        InputError, ModelError, MediaError: one line each.
    """
    started = time.monotonic()
    if bits != 4:
        raise InputError(f"bits {bits} is not supported: huoyan quantizes to 4 bits")
    if method not in ("awq", "rtn"):
        raise InputError(f"method {method!r} is unknown: use awq or rtn")
    if quantize_head not in (None, "none", "int8"):
        raise InputError(f"quantize_head {quantize_head!r} is unknown: use int8, or none")
    int8 = quantize_head == "int8"
    chosen = _modules(modules)
    checkpoint = open_checkpoint(resolve_model(model))
    _check_source(checkpoint, group_size)
    where = _device(device)
    say = note or (lambda line: None)
    dtype = torch.float16 if where.type == "cuda" else torch.float32
    if calibration is None or isinstance(calibration, str | Path):
        items = read_calibration(calibration)
    else:
        items = list(calibration)
    options = AwqOptions(group_size, method, clip, compensate, chosen)
    made_from = _fingerprint(checkpoint, options, items, max_tokens) | {"int8_tables": int8}
    writer = QuantizedWriter(Path(out), made_from, say)
    layers = checkpoint.config.text.num_hidden_layers
    resumed = sum(writer.has(_shard(i)) for i in range(layers))
    if resumed:
        say(f"going on where an earlier run stopped: {resumed} of {layers} layers are there")

    with TensorReader(checkpoint.tensors) as reader:
        encoded, table = _embed(checkpoint, reader, items, where, dtype, max_tokens, int8)
        if len(encoded) < len(items):
            say(
                f"{len(items) - len(encoded)} of {len(items)} calibration items are longer than {max_tokens} tokens"
            )
        streams = _streams(encoded, table)
        with torch.device("meta"):
            whole = MiniCPMV(checkpoint.config)
        for i in range(layers):
            _one_layer(whole, i, reader, streams, options, writer, dtype, where)
            if step is not None:
                step(i + 1, layers, f"layer {i + 1}")
        quality = _measure(checkpoint, reader, streams, encoded, where, dtype, int8)
        _write_rest(checkpoint, reader, writer, int8)

    notes = [writer.notes[_shard(i)] for i in range(layers)]
    report: dict[str, Any] = {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "modules": list(chosen),
        "clip": options.clips,
        "compensate": compensate,
        "head": "int8" if int8 else "16 bits",
        "calibration_items": sum(streams.calibrated),
        "held_out_items": len(streams.calibrated) - sum(streams.calibrated),
        "layers": notes,
        **quality,
    }
    config = read_json(checkpoint.folder / "config.json")
    config["quantization_config"] = awq_config(group_size, _kept(chosen))
    if int8:
        config["quantization_config"][CONFIG_KEY] = "int8"
    config["torch_dtype"] = "float16"
    config.pop("dtype", None)
    writer.finish(checkpoint.folder, config, report)
    return QuantizeReport(
        folder=Path(out),
        layers=notes,
        bytes_before=checkpoint.nbytes,
        bytes_after=open_checkpoint(out).nbytes,
        seconds=time.monotonic() - started,
        resumed_layers=resumed,
        int8_head=int8,
        **quality,
    )


def _modules(asked: str | Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for name in asked.split(",")] if isinstance(asked, str) else list(asked)
    for name in names:
        if name not in MODULES:
            raise InputError(f"module {name!r} is unknown: use any of {', '.join(MODULES)}")
    if not names:
        raise InputError(f"no module to quantize: use any of {', '.join(MODULES)}")
    return tuple(name for name in MODULES if name in names)


def _device(asked: str | torch.device | None) -> torch.device:
    if asked is None or asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise InputError(f"device {asked!r} is unknown: use auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CapacityError("there is no CUDA device here: leave the device out, or use cpu")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {asked!r} cannot quantize: use auto, cpu, cuda or cuda:1")
    return device


def _kept(chosen: Sequence[str]) -> list[str]:
    """What stays in 16 bits, as `modules_to_not_convert` names it: parts of module names."""
    kept = ["vpm", "resampler", "lm_head"]
    for name, path in MODULES.items():
        if name not in chosen:
            (source,) = sources([f"llm.{path}.weight"])
            kept += [part.removesuffix(".weight").rpartition(".")[2] for part in source.parts]
    return kept


def _check_source(checkpoint: Checkpoint, group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise InputError(
            f"group size {group_size} is not supported: use one of {', '.join(map(str, GROUP_SIZES))}"
        )
    if any(is_int4(n) or (info.dtype == "I8") for n, info in checkpoint.tensors.items()):
        raise ModelError(f"{checkpoint.folder} is quantized already: quantize the original checkpoint")
    text = checkpoint.config.text
    for name, width in (("hidden_size", text.hidden_size), ("intermediate_size", text.intermediate_size)):
        if width % group_size:
            raise InputError(
                f"{name} {width} is no multiple of the group size {group_size}: use a smaller group"
            )


def _fingerprint(
    checkpoint: Checkpoint, options: AwqOptions, items: Sequence[CalibrationItem], max_tokens: int
) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on from."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps([item.question, item.answer, item.max_slices]).encode())
        for picture in item.pictures:
            digest.update(picture.digest)
    tensors = hashlib.blake2b(digest_size=16)
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        stat = file.stat()
        tensors.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return {
        "model": str(checkpoint.folder.resolve()),
        "tensors": tensors.hexdigest(),
        "options": asdict(options),
        "calibration": digest.hexdigest(),
        "max_tokens": max_tokens,
    }


def _embed(
    checkpoint: Checkpoint,
    reader: TensorReader,
    items: Sequence[CalibrationItem],
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    int8: bool,
) -> tuple[list[EncodedItem], Int8Weight | None]:
    """Items as embeddings, and the embedding table in eight bits where it is to be so.

    Only the encoder, the resampler and the embedding table are loaded, then let go.
    """
    from huoyan.prompt.processor import PromptProcessor

    processor = PromptProcessor.from_folder(checkpoint.folder)
    with torch.device("meta"):
        model = MiniCPMV(checkpoint.config)
    load_part(model.vpm, "vpm", reader, dtype, device)
    load_part(model.resampler, "resampler", reader, dtype, device)
    load_part(model.llm.model.embed_tokens, "llm.model.embed_tokens", reader, dtype, device)
    model.norm_mean, model.norm_std = processor.rules.norm_mean, processor.rules.norm_std
    with torch.inference_mode():
        encoded = embed_items(encode_items(items, processor, max_tokens), model)
        return encoded, round_to_int8(model.llm.model.embed_tokens.weight) if int8 else None


def _streams(encoded: Sequence[EncodedItem], table: Int8Weight | None) -> _Streams:
    """The first layer's inputs; the quantized model's words come from its own `table` where it has one."""
    x = torch.cat([item.embeddings for item in encoded if item.embeddings is not None])
    int4_x = x.clone()
    if table is not None:
        ids = torch.tensor([token for item in encoded for token in item.token_ids], device=x.device)
        words = torch.cat([item.is_text for item in encoded]).to(x.device)
        int4_x[words] = Int8Embedding(table, x.dtype)(ids[words])
    lengths = [len(item.token_ids) for item in encoded]
    calibrated = [i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1 or len(encoded) < HELD_OUT_EVERY for i in range(len(encoded))]  # fmt: skip # noqa: E501
    weights = token_weights([item for item, flag in zip(encoded, calibrated, strict=True) if flag])
    return _Streams(x, int4_x, lengths, calibrated, weights.to(x.device))


def _shard(layer: int) -> str:
    return f"layer-{layer:05d}"


def _one_layer(
    whole: MiniCPMV,
    index: int,
    reader: TensorReader,
    streams: _Streams,
    options: AwqOptions,
    writer: QuantizedWriter,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Quantize layer `index` (or read what an earlier run made of it) and send both streams through it."""
    prefix = f"llm.model.layers.{index}"
    with torch.device("meta"):
        layer = DecoderLayer(whole.config.text)
    load_part(layer, prefix, reader, dtype, device)
    rotary = whole.llm.model.rotary
    with torch.inference_mode():
        both = LayerInputs(streams.float_x, streams.lengths, rotary)
        target = both.run(layer)
        if writer.has(_shard(index)):
            _restore(layer, writer.partial / f"{_shard(index)}.safetensors", prefix)
        else:
            began = time.monotonic()
            chosen = [n for n, flag in zip(streams.lengths, streams.calibrated, strict=True) if flag]
            rows = streams.rows(True).to(device)
            inputs, seen = (LayerInputs(x[rows], chosen, rotary) for x in (streams.float_x, streams.int4_x))
            quantized = quantize_layer(layer, inputs, options, seen, streams.weights)
            change = (target - streams.float_x).float()
            error = (both.run(layer) - target).float()
            note = {
                "layer": index,
                "relative_error": float(error.norm() / change.norm()),
                "scale_exponents": quantized.scale_exponents,
                "seconds": round(time.monotonic() - began, 3),
            }
            writer.write(_shard(index), _published(layer, quantized.weights, prefix), note)
        streams.int4_x = LayerInputs(streams.int4_x, streams.lengths, rotary).run(layer)
        streams.float_x = target


def _published(layer: DecoderLayer, weights: dict[str, Int4Weight], prefix: str) -> dict[str, Tensor]:
    """The layer's tensors in the published int4 layout."""
    out: dict[str, Tensor] = {}
    for name, parameter in layer.named_parameters():
        (source,) = sources([f"{prefix}.{name}"])
        module = name.removesuffix(".weight")
        linear = layer.get_submodule(name.rpartition(".")[0])
        splits = getattr(linear, "splits", (parameter.shape[0],))
        if module in weights:
            weight = weights[module]
            pieces = (t.split(splits) for t in (weight.q, weight.scales, weight.zeros))
            for part, q, scales, zeros in zip(source.parts, *pieces, strict=True):
                matrix = part.removesuffix(".weight")
                out[f"{matrix}.qweight"] = pack_nibbles(q.T.contiguous().cpu(), AWQ_ORDER)
                out[f"{matrix}.qzeros"] = pack_nibbles(zeros.T.contiguous().to(torch.uint8).cpu(), AWQ_ORDER)
                out[f"{matrix}.scales"] = scales.T.contiguous().half()
        else:
            values = parameter.detach().split(splits) if len(source.parts) > 1 else (parameter.detach(),)
            out.update((part, value.half()) for part, value in zip(source.parts, values, strict=True))
    return out


def _restore(layer: DecoderLayer, shard: Path, prefix: str) -> None:
    """Give the layer the dense weights that an earlier run's shard stands for."""
    from safetensors.torch import load_file

    from huoyan.models.int4_formats import quantized_parts, read_int4

    state = load_file(shard)
    for name, parameter in list(layer.named_parameters()):
        (source,) = sources([f"{prefix}.{name}"])
        linear = layer.get_submodule(name.rpartition(".")[0])
        splits = getattr(linear, "splits", (parameter.shape[0],))
        pieces = []
        for part, rows in zip(
            source.parts, splits if len(source.parts) > 1 else (parameter.shape[0],), strict=True
        ):
            matrix = part.removesuffix(".weight")
            int4 = quantized_parts(set(state), matrix) if part not in state else ()
            shape = (rows, parameter.shape[-1])
            pieces.append(
                read_int4(state.__getitem__, int4, matrix, shape, None).dequantize() if int4 else state[part]
            )
        set_parameter(layer, name, torch.cat(pieces).to(parameter.device, parameter.dtype))


def _measure(
    checkpoint: Checkpoint,
    reader: TensorReader,
    streams: _Streams,
    encoded: Sequence[EncodedItem],
    device: torch.device,
    dtype: torch.dtype,
    int8: bool,
) -> dict[str, float | None]:
    """Perplexity of the held-out answers by both streams, and how often their likeliest tokens agree."""
    with torch.device("meta"):
        model = MiniCPMV(checkpoint.config)
    load_part(model.llm.model.norm, "llm.model.norm", reader, dtype, device)
    tied = checkpoint.config.text.tie_word_embeddings
    head = "llm.model.embed_tokens" if tied else "llm.lm_head"
    load_part(model.llm.lm_head, head, reader, dtype, device)
    heads: dict[str, nn.Module] = {"before": model.llm.lm_head, "after": model.llm.lm_head}
    if int8:
        heads["after"] = Int8Linear(round_to_int8(model.llm.lm_head.weight))
    losses = {"before": 0.0, "after": 0.0}
    agreed = counted = 0
    start = 0
    with torch.inference_mode():
        for item, calibrated in zip(encoded, streams.calibrated, strict=True):
            end = start + len(item.token_ids)
            first = max(item.answer_start - 1, 0)
            if not calibrated and first < len(item.token_ids) - 1:
                targets = torch.tensor(item.token_ids[first + 1 :], device=device)
                best = []
                for name, x in (("before", streams.float_x), ("after", streams.int4_x)):
                    logits = heads[name](model.llm.model.norm(x[start + first : end - 1])).float()
                    losses[name] += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
                    best.append(logits.argmax(-1))
                agreed += int((best[0] == best[1]).sum())
                counted += len(targets)
            start = end
    if not counted:
        return {"perplexity_before": None, "perplexity_after": None, "agreement": None}
    return {
        "perplexity_before": math.exp(min(losses["before"] / counted, 700)),
        "perplexity_after": math.exp(min(losses["after"] / counted, 700)),
        "agreement": agreed / counted,
    }


def _write_rest(checkpoint: Checkpoint, reader: TensorReader, writer: QuantizedWriter, int8: bool) -> None:
    """Everything but the layers, in float16 or the vocabulary's tables in int8, in shards of a few gigabytes."""
    rest = sorted(n for n in checkpoint.tensors if not n.startswith("llm.model.layers."))
    if checkpoint.config.text.tie_word_embeddings and int8:
        rest = [name for name in rest if name != f"{HEAD}.weight"]
    shards: list[list[str]] = [[]]
    room = 4_000_000_000
    for name in rest:
        size = checkpoint.tensors[name].nbytes
        if size > room and shards[-1]:
            shards.append([])
            room = 4_000_000_000
        shards[-1].append(name)
        room -= size
    for i, names in enumerate(shards):
        shard = f"rest-{i:05d}"
        if not writer.has(shard):
            tensors: dict[str, Tensor] = {}
            for name in names:
                value = reader.read(name)
                if int8 and name.removesuffix(".weight") in TABLES:
                    table = round_to_int8(value)
                    tensors |= {name: table.q, f"{name}_scale": table.scales}
                else:
                    tensors[name] = value.half() if value.is_floating_point() else value
            writer.write(shard, tensors, {"tensors": len(names)})
