"""What would fit where something does not: one clause for the end of an error."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from huoyan.planning.memory import memory
from huoyan.planning.shapes import published_shapes
from huoyan.planning.sizes import gib

if TYPE_CHECKING:
    from huoyan.engine.config import EngineConfig
    from huoyan.models.config import ModelConfig
    from huoyan.planning.workspace import Way

USEFUL_TOKENS = 2048
"""A context shorter than a picture, a question and an answer is not proposed."""
_SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 512}


def what_fits(config: ModelConfig, engine: EngineConfig, way: Way, budget: int, *, int4: bool) -> str:
    """The mildest change with which the model runs in `budget` bytes, or what it takes at least.

    `int4`: whether the checkpoint at hand is.
    """
    useful = min(USEFUL_TOKENS, config.text.max_position_embeddings)
    shorter = replace(engine, max_model_len=None, num_blocks=None, kv_cache_bytes=None)
    few = replace(
        shorter,
        max_num_seqs=min(engine.max_num_seqs, _SMALL["max_num_seqs"]),
        max_num_batched_tokens=min(engine.max_num_batched_tokens, _SMALL["max_num_batched_tokens"]),
        picture_cache_bytes=0,
    )
    less = "max_num_seqs={max_num_seqs} and max_num_batched_tokens={max_num_batched_tokens}".format(
        **{name: getattr(few, name) for name in _SMALL}
    )
    shapes = published_shapes(config)

    def tokens(options: EngineConfig, quantized: bool) -> int:
        options = replace(options, max_model_len=useful)
        parts = memory(config, options, way, shapes, int4=quantized)
        longest = parts.blocks_in(budget) * options.block_size
        if longest < useful:
            return 0
        # A longer context takes some workspace of its own.
        options = replace(options, max_model_len=min(longest, config.text.max_position_embeddings))
        found = memory(config, options, way, shapes, int4=quantized).blocks_in(budget) * options.block_size
        return max(found, useful)

    found = []
    longest = tokens(shorter, int4)
    asked = engine.max_model_len or 0
    if longest:
        found.append(f"max_model_len={min(longest, config.text.max_position_embeddings)} fits")
    elif tokens(few, int4):
        found.append(f"{less} fit with max_model_len={tokens(few, int4)}")
    if not int4:
        for options, how in ((shorter, ""), (few, f" with {less}")):
            longer = tokens(options, True)
            if longer > longest and longer >= asked:
                longest = longer
                room = min(longest, config.text.max_position_embeddings)
                found.append(f"the int4 checkpoint fits{how} (context {room})")
                break
    if not found:
        least = memory(config, replace(few, max_model_len=useful), way, shapes, int4=True)
        needed = least.fixed + -(-useful // engine.block_size) * least.block
        found.append(f"the least it runs in is {gib(needed)} (int4, {less}, max_model_len={useful})")
    return ", or ".join(found)
