"""`huoyan.plan`: what a model takes of a card and what fits beside it, from the checkpoint's headers alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huoyan.engine.config import EngineConfig
from huoyan.errors import InputError, ModelError
from huoyan.planning.cards import CARDS, Card, find_card, this_card
from huoyan.planning.memory import Memory, memory
from huoyan.planning.request_shape import RequestShape, parse_resolution, request_shape
from huoyan.planning.roofline import Limit, limit
from huoyan.planning.shapes import published_shapes
from huoyan.planning.workspace import Way

if TYPE_CHECKING:
    from huoyan.media.types import SliceRules
    from huoyan.models.config import ModelConfig
    from huoyan.planning.shapes import Shape

KV_CHOICES = ("auto", "int8", "fp8")


@dataclass(frozen=True)
class Parts:
    """Bytes of the device's memory. They add up to `budget` where the KV cache takes all that is left."""

    decoder: int
    """Weights of the decoder's layers."""
    embeddings: int
    head: int
    vision: int
    """Encoder and resampler."""
    tables: int
    kv_cache: int
    workspace: int
    """What a step takes at its fullest."""
    pictures: int
    """Embeddings of recent pictures."""
    graphs: int
    slack: int
    """What the allocator reserves beyond what is used."""
    context: int
    """The CUDA context."""

    @property
    def weights(self) -> int:
        return self.decoder + self.embeddings + self.head + self.vision + self.tables

    @property
    def whole(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class KVOption:
    """One dtype of the KV cache."""

    kv_cache_dtype: str
    bytes_per_token: int
    tokens: int
    """That the cache holds."""
    longest_context: int
    """Of one request; at most what the checkpoint was made for."""
    largest_batch: int
    """Requests of the given shape at once."""


@dataclass(frozen=True)
class Variant:
    """The model in 16 bits, or with its decoder in int4."""

    name: str
    """`bfloat16`, `float16`, or `int4`."""
    predicted: bool
    """Whether the checkpoint at hand is the other one, and this comes from its shapes."""
    fits: bool
    """Whether a sequence of one block has room."""
    parts: Parts
    kv: tuple[KVOption, ...]
    """The cache that was asked for first."""
    limits: tuple[Limit, ...]
    """Rooflines of known cards: no card goes beyond, none quite gets there."""


@dataclass(frozen=True)
class Plan:
    """What `huoyan plan` prints."""

    model: str
    card: str
    budget: int
    """Bytes that may be taken."""
    request: RequestShape
    context: int
    """What the checkpoint was made for."""
    max_num_seqs: int
    max_num_batched_tokens: int
    variants: tuple[Variant, ...]
    """The checkpoint as it is, then the other one."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def plan(
    model: str | os.PathLike[str],
    gpu: str | int | None = None,
    *,
    images: int = 1,
    resolution: str | tuple[int, int] = (1344, 896),
    max_tokens: int = 512,
    kv_cache_dtype: str = "auto",
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    max_model_len: int | None = None,
    hub: str = "huggingface",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Plan:
    """Say what fits a card, without loading the model: its headers are read, over the network where it is not here.

    Args:
        model: as of `LLM`; or `minicpm-v-2_6` or `minicpm-v-2_6-int4`, the published sizes without any checkpoint.
        gpu: memory ("24GiB" or bytes), a card's name ("RTX 4090"), or "auto" for the one of this machine; None is
            "auto" where there is one, else 24 GiB.
        images, resolution, max_tokens: of the requests whose number is wanted.
        kv_cache_dtype: what the KV cache is to be kept in; the others are listed behind it.
        max_num_seqs, max_num_batched_tokens, max_model_len: as of `LLM`; they decide the workspace.

    Raises:
        ModelError: no such model, or its headers cannot be read.
        InputError: an unknown card, or a request that cannot be.
    """
    from huoyan.bench.checkpoint_shapes import named_shape, sizes_of
    from huoyan.media.slicing import MAX_SLICE_GROWTH

    named = named_shape(model)
    if named is None:
        config, shapes, rules = open_shapes(model, hub=hub, revision=revision, cache_dir=cache_dir)
        is_int4 = any(name.endswith((".qweight", ".weight_packed")) for name in shapes)
    else:
        config, rules = sizes_of(*named)
        shapes, is_int4 = published_shapes(config), named[1] is not None
    card = _card(gpu)
    if isinstance(resolution, str):
        resolution = parse_resolution(resolution)
    request = request_shape(rules, config.query_num, images, resolution, max_tokens)
    patches = MAX_SLICE_GROWTH * (rules.scale_resolution // rules.patch_size) ** 2
    engine = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        max_slice_patches=patches,
    )
    return Plan(
        model=os.fspath(model),
        card=card.name,
        budget=card.memory,
        request=request,
        context=config.text.max_position_embeddings,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        variants=tuple(
            _variant(config, engine, shapes, card, request, int4, predicted)
            for int4, predicted in ((is_int4, False), (not is_int4, True))
        ),
    )


def open_shapes(
    model: str | os.PathLike[str],
    *,
    hub: str = "huggingface",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[ModelConfig, Mapping[str, Shape], SliceRules]:
    """A model's sizes, the shapes of its tensors, and how it cuts pictures.

    Raises:
        ModelError: as `plan`.
    """
    from huoyan.media.slicing import read_slice_rules
    from huoyan.models.checkpoint import open_checkpoint
    from huoyan.models.config import read_model_config
    from huoyan.models.hub import find_model, is_offline

    folder = find_model(model, hub=hub, revision=revision, cache_dir=cache_dir)
    if folder is not None:
        checkpoint = open_checkpoint(folder)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        return checkpoint.config, shapes, read_slice_rules(folder)
    name = os.fspath(model)
    if is_offline():
        raise ModelError(
            f"{name} is not on this machine and the network is switched off (HF_HUB_OFFLINE): "
            "give a checkpoint folder, or plan it online (only headers are read)"
        )
    if hub != "huggingface":
        raise ModelError(f"{name} is not on this machine: only Hugging Face's headers are read from afar")
    from huoyan.models.hub_headers import fetch_headers

    with tempfile.TemporaryDirectory() as temporary:
        try:
            tensors = fetch_headers(name, revision, Path(temporary))
            shapes = {tensor: info.shape for tensor, info in tensors.items()}
            return read_model_config(Path(temporary)), shapes, read_slice_rules(temporary)
        except ModelError as error:
            raise ModelError(str(error).replace(temporary, name)) from None


def _card(gpu: str | int | None) -> Card:
    if gpu is not None and gpu != "auto":
        return find_card(str(gpu))
    try:
        return this_card()
    except (InputError, ImportError):
        if gpu == "auto":
            raise
        return find_card("24GiB")


def _variant(
    config: ModelConfig,
    engine: EngineConfig,
    shapes: Mapping[str, Shape],
    card: Card,
    request: RequestShape,
    int4: bool,
    predicted: bool,
) -> Variant:
    from huoyan.kernels import decode_kernels_enabled

    way = Way(itemsize=2, cuda=True, kernels=decode_kernels_enabled())

    def parts_for(kv_dtype: str) -> Memory:
        return memory(config, engine, way, shapes, int4=int4, kv_dtype=kv_dtype)

    kinds = (engine.kv_cache_dtype, *(kind for kind in KV_CHOICES if kind != engine.kv_cache_dtype))
    found = parts_for(kinds[0])
    context = engine.max_model_len or config.text.max_position_embeddings
    useful = engine.max_num_seqs * -(-context // engine.block_size)
    blocks = min(found.blocks_in(card.memory), useful)

    def option(kind: str) -> KVOption:
        parts = parts_for(kind)
        tokens = min(parts.blocks_in(card.memory), useful) * engine.block_size
        return KVOption(
            kind, parts.kv_token, tokens, min(tokens, context), batch_in(parts, card.memory, request, engine)
        )

    weights = found.weights
    dtype = "float16" if config.dtype in ("float16", "half") else "bfloat16"
    known = [c for c in CARDS if c.bandwidth]
    if card.bandwidth and card.name not in {c.name for c in known}:
        known.insert(0, card)
    return Variant(
        name="int4" if int4 else dtype,
        predicted=predicted,
        fits=blocks > 0,
        parts=Parts(
            decoder=weights.layers,
            embeddings=weights.embeddings,
            head=weights.head,
            vision=weights.vision + weights.resampler,
            tables=weights.tables,
            kv_cache=blocks * found.block,
            workspace=found.workspace.total,
            pictures=found.pictures,
            graphs=found.graphs,
            slack=found.slack,
            context=found.context,
        ),
        kv=tuple(option(kind) for kind in kinds),
        limits=tuple(
            limit(config, found, c, request.length, batch_in(found, c.memory, request, engine)) for c in known
        ),
    )


def batch_in(parts: Memory, budget: int, request: RequestShape, engine: EngineConfig) -> int:
    """Requests of this shape that run at once in `budget` bytes."""
    blocks = -(-request.length // engine.block_size)
    return min(parts.blocks_in(budget) // blocks, engine.max_num_seqs)
