"""A running engine's memory in parts, and what is left for the KV cache: `huoyan plan` shows it, the engine obeys."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from huoyan.engine.kv_format import kv_bytes_per_token
from huoyan.planning.allocator import grows, reserved_bytes, whole_segments
from huoyan.planning.driver import GRAPH_DRIVER, context_bytes
from huoyan.planning.graphs import (
    STEP_GRAPH_TOKENS,
    captured_rows,
    decode_graph_inputs,
    graph_sizes,
    step_graph_inputs,
    step_graph_sizes,
)
from huoyan.planning.pieces import (
    BESIDE_GRAPH_PATCHES,
    ENCODER_GRAPH_PATCHES,
    PICTURE_SLICES,
)
from huoyan.planning.weights import INT4_GROUP, Weights, weights
from huoyan.planning.workspace import (
    Limits,
    Way,
    Workspace,
    captured,
    captured_encoder,
    captured_steps,
    with_encoder_passes,
    workspace,
)

if TYPE_CHECKING:
    from huoyan.engine.config import EngineConfig
    from huoyan.models.config import ModelConfig
    from huoyan.planning.shapes import Shape

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
"""Where torch reads how large cuBLAS's workspace is to be: ":KiB:COUNT", once or several times. It keeps one for every
stream and thread, and cuBLASLt has the same."""
CUBLAS_OURS = ":8192:1"
"""What an engine lets it have: products of the model's shapes take as long as with Hopper's 32 MiB (with 16 some take
longer: see benchmarks/NOTES.md)."""
CUBLAS_TORCHS = ":32768:1"
"""What it has by itself, at most: on Hopper."""
FRAGMENTS = 16
"""One part in this many of what comes and goes is lost between tensors of different sizes."""


@dataclass(frozen=True)
class Memory:
    """Bytes of each part but the KV cache, which gets the rest."""

    weights: Weights
    workspace: Workspace
    pictures: int
    """Embeddings of recent pictures."""
    graphs: int
    slack: int
    """What torch's allocator reserves beyond what is used."""
    context: int
    """The CUDA context."""
    kv_token: int
    limits: Limits
    block_size: int

    @property
    def beside_weights(self) -> int:
        """All that comes on top of the weights and the KV cache inside torch's allocator, and graphs."""
        return self.workspace.total + self.pictures + self.graphs + self.slack

    @property
    def fixed(self) -> int:
        return self.weights.total + self.beside_weights + self.context

    @property
    def block(self) -> int:
        return self.kv_token * self.block_size

    def blocks_in(self, budget: int) -> int:
        """Blocks of the KV cache when everything together takes `budget` bytes at most."""
        return max(budget - self.fixed, 0) // self.block


def memory(
    config: ModelConfig,
    engine: EngineConfig,
    way: Way,
    shapes: Mapping[str, Shape],
    *,
    int4: bool | None = None,
    kv_dtype: str | None = None,
) -> Memory:
    """The parts of an engine of these options.

    `shapes` and `int4` are as for `weights`; `kv_dtype` takes the place of the options' own.
    """
    kv_dtype = kv_dtype or engine.kv_cache_dtype
    found = weights(config, shapes, way.itemsize, int4=int4)
    way = replace(way_of(way, found), kv8=kv_dtype != "auto")
    limits = limits_of(config, engine, way)
    space = workspace(config, way, limits)
    pictures = picture_bytes(config, engine, way)
    rounding = 0
    if way.cuda:
        resident = _resident(config, shapes, way)
        rounding = reserved_bytes(resident, growing=grows()) - sum(resident)
    return Memory(
        weights=found,
        workspace=space,
        pictures=pictures,
        graphs=graph_bytes(config, engine, way, limits),
        slack=slack_bytes(way, space, pictures) + rounding,
        context=context_bytes() if way.cuda else 0,
        kv_token=kv_bytes_per_token(config.text, way.itemsize, kv_dtype),
        limits=limits,
        block_size=engine.block_size,
    )


def way_of(way: Way, found: Weights) -> Way:
    """`way` with the packing that these weights have where nothing says so."""
    if not found.int4:
        return replace(way, int4=None)
    return way if way.int4 else replace(way, int4="words" if way.kernels else "bytes")


def limits_of(config: ModelConfig, engine: EngineConfig, way: Way) -> Limits:
    """What a step holds at most, encoder passes as large as the workspace of the other moments."""
    longest = config.text.max_position_embeddings
    limits = Limits(
        tokens=engine.max_num_batched_tokens,
        seqs=engine.max_num_seqs,
        context=min(engine.max_model_len or longest, longest),
        block_size=engine.block_size,
        encoder_slices=engine.max_encoder_slices,
        encoder_patches=0,
    )
    return with_encoder_passes(config, way, limits, engine.max_slice_patches)


def picture_bytes(config: ModelConfig, engine: EngineConfig, way: Way) -> int:
    """The picture cache, and what one picture may have that is larger than all of it."""
    alone = PICTURE_SLICES * slice_bytes(config, way.itemsize)
    capacity = engine.picture_cache_bytes
    return capacity if capacity >= alone else capacity + alone


def slice_bytes(config: ModelConfig, itemsize: int) -> int:
    """The embeddings of one slice."""
    return config.query_num * config.text.hidden_size * itemsize


def graph_bytes(config: ModelConfig, engine: EngineConfig, way: Way, limits: Limits) -> int:
    """CUDA graphs of steps and of the encoder: the memory that those of a stream share, and the driver's own."""
    if not way.kernels or engine.enforce_eager:
        return 0
    sizes = graph_sizes(captured_rows(limits.seqs, way.int4))
    few, mixed = step_graph_sizes(limits.tokens, limits.seqs)
    blocks = -(-limits.context // limits.block_size)
    numbers, tables = step_graph_inputs([*few, *mixed], blocks)
    shapes = (*decode_graph_inputs(sizes[-1], blocks), (1, numbers), tables)
    inputs = sum(4 * prod(shape) for shape in shapes)
    # What runs on the step's stream shares a pool, and what goes in and comes out.
    shared = max(
        captured(config, way, limits, sizes[-1]),
        captured_steps(config, way, limits, mixed[-1].tokens, mixed[-1].decodes),
        captured_encoder(config, way, ENCODER_GRAPH_PATCHES[-1]),
    )
    # Beside decodes the encoder's have a pool of their own.
    beside = whole_segments(captured_encoder(config, way, BESIDE_GRAPH_PATCHES[-1]))
    stay = exchanged_values(config) + exchanged_beside(config)
    pool = whole_segments(shared + shared // FRAGMENTS)
    return inputs + pool + beside + stay * way.itemsize + graph_driver_bytes(way, limits)


def exchanged_values(config: ModelConfig) -> int:
    """Numbers that the graphs of prompts and of the encoder on a step's stream have one place for: what goes in, and
    what comes out in its place."""
    prompts = STEP_GRAPH_TOKENS[-1] * config.text.hidden_size
    return max(prompts, ENCODER_GRAPH_PATCHES[-1] * config.vision.hidden_size)


def exchanged_beside(config: ModelConfig) -> int:
    """The same of the encoder's graphs beside decodes."""
    return BESIDE_GRAPH_PATCHES[-1] * config.vision.hidden_size


def graph_driver_bytes(way: Way, limits: Limits) -> int:
    """What captured graphs take outside of torch's allocator."""
    decodes = len(graph_sizes(captured_rows(limits.seqs, way.int4)))
    encodes = len(ENCODER_GRAPH_PATCHES) + len(BESIDE_GRAPH_PATCHES)
    few, mixed = step_graph_sizes(limits.tokens, limits.seqs)
    return GRAPH_DRIVER * (decodes + len(few) + len(mixed) + encodes)


def slack_bytes(way: Way, space: Workspace, pictures: int) -> int:
    """Rounding of the allocator where tensors come and go, and cuBLAS's workspaces; nothing on a CPU."""
    if not way.cuda:
        return 0
    # What torch keeps of the step's stream, of the encoder's, and of the pictures that stay is apart.
    pools = [max(space.encoder, space.steps), space.beside]
    reserved = sum(whole_segments(pool + pool // FRAGMENTS) for pool in pools) + whole_segments(pictures)
    return cublas_bytes(way) + reserved - sum(pools) - pictures


def cublas_bytes(way: Way) -> int:
    """Its workspaces: of the step's own stream, and of the encoder's, and each of the thread that has captured graphs
    and of the one that runs the engine, which a server's is not."""
    return 2 * (1 + way.kernels) * _cublas_workspace() if way.cuda else 0


def _cublas_workspace() -> int:
    said = re.findall(r":(\d+):(\d+)", os.environ.get(CUBLAS_VARIABLE) or CUBLAS_OURS)
    return sum(int(size) * int(count) for size, count in said) * 1024


def _resident(config: ModelConfig, shapes: Mapping[str, Shape], way: Way) -> list[int]:
    """Bytes of each tensor that stays, stacked as the model has them, in the order they are loaded."""
    from huoyan.models.layout import stacked_name

    dense: dict[str, int] = {}
    packed: dict[str, int] = {}
    for name, shape in shapes.items():
        plain, _, suffix = name.rpartition(".")
        is_int4 = suffix in ("qweight", "weight_packed")
        if not is_int4 and suffix not in ("weight", "bias") and not name.startswith("resampler."):
            continue
        matrix = plain if is_int4 else name
        values = prod(shape) * (8 if is_int4 else 1)
        target = stacked_name(matrix if not is_int4 else f"{plain}.weight")
        if way.int4 and (is_int4 or (name.startswith("llm.model.layers.") and len(shape) == 2)):
            packed[target] = packed.get(target, 0) + values
        else:
            dense[target] = dense.get(target, 0) + values * way.itemsize
    sizes = list(dense.values())
    for values in packed.values():
        sizes += [values // 2, values // INT4_GROUP * way.itemsize, values // INT4_GROUP * way.itemsize]
    return sizes
