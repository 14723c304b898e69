"""The loss of one step: answer tokens, and what the auxiliary heads must name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from huoyan.layers import linear
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.patches import normalise
from tiny_trainer.attention import RotatingRowsAttention, RowsAttention
from tiny_trainer.auxiliary import AuxiliaryHeads
from tiny_trainer.fixed import QUERIES, FixedBatch, Shape
from tiny_trainer.grids import GridTables
from tiny_trainer.slice_attention import SliceAttention


@dataclass(frozen=True)
class Way:
    """How a step is computed; the result is the same but for rounding.

    Attributes:
        packed: by torch's attention for packed sequences, which only CUDA has and only in 16 bits; else padded.
        fused: with `tiny_trainer.fused_steps`.
        graphed: as one CUDA graph; of no concern here.
    """

    packed: bool = False
    fused: bool = False
    graphed: bool = False


PLAIN = Way()


@dataclass(frozen=True, eq=False)
class Losses:
    """`answers` is the mean over weighted answer tokens; `by_family` [families, 2] holds (weighted sum, weight)."""

    answers: Tensor
    patches: Tensor
    queries: Tensor
    by_family: Tensor


def see(
    model: MiniCPMV, patches: Tensor, batch: FixedBatch, tables: GridTables, attend: SliceAttention
) -> tuple[Tensor, Tensor]:
    """Normalised patches [P, pixels] -> the encoder's output [P, width], the resampler's [slices * QUERIES, hidden].

    What `model.vpm` and `model.resampler` compute, with everything about the slices read on the device.
    """
    own_grid = batch.grids.long().index_select(0, attend.slice_of)
    embeddings = model.vpm.embeddings
    x = embeddings.patch_embedding(patches) + embeddings.position_embedding(
        tables.positions[own_grid, attend.offset]
    )
    for layer in model.vpm.encoder.layers:
        attention = layer.self_attn
        q, k, v = attention.qkv_proj(layer.layer_norm1(x)).unflatten(-1, (3, attention.heads, -1)).unbind(1)
        x = x + attention.out_proj(attend.within(q, k, v).flatten(1))
        x = x + layer.mlp(layer.layer_norm2(x))[0]
    seen = model.vpm.post_layernorm(x)
    resampler = model.resampler
    values = resampler.ln_kv(resampler.kv_proj(seen))
    keys = values + tables.waves.index_select(0, tables.places[own_grid, attend.offset])
    query = resampler.attn.project(0, resampler.ln_q(resampler.query)).repeat(attend.slices, 1, 1)
    out = attend.across(query, resampler.attn.project(1, keys), resampler.attn.project(2, values))
    return seen, resampler.ln_post(resampler.attn.out_proj(out.flatten(1))) @ resampler.proj


def hidden_states(
    model: MiniCPMV, batch: FixedBatch, shape: Shape, embeddings: Tensor, way: Way = PLAIN
) -> Tensor:
    """embeddings [slices * QUERIES, hidden] -> [tokens, hidden]."""
    x = model.embed(batch.ids.long())
    # What belongs to no example goes to a row that is cut off again.
    x = torch.cat((x, x.new_zeros(1, x.shape[1])))
    x = x.index_copy(0, batch.slots.long(), embeddings.to(x.dtype))[:-1]
    positions = batch.positions.long()
    if not way.fused:
        return model.decoder(x, positions, RowsAttention(batch.branch, batch.owner, shape.rows, x.dtype))
    text = model.config.text
    cos, sin = model.llm.model.rotary.lookup(positions)
    rotation = (cos.contiguous(), sin.contiguous())
    heads = (text.num_attention_heads, text.num_key_value_heads)
    attend = RotatingRowsAttention(batch.branch, batch.owner, shape.rows, x.dtype, rotation, heads)
    with fused_silu_mul():
        return model.decoder(x, positions, attend)


@contextmanager
def fused_silu_mul() -> Iterator[None]:
    """Inside, the decoder's MLP has a kernel that gradients flow through."""
    from tiny_trainer.fused_steps import silu_mul

    plain = linear.silu_mul
    linear.silu_mul = silu_mul
    try:
        yield
    finally:
        linear.silu_mul = plain


def compute_losses(
    model: MiniCPMV,
    heads: AuxiliaryHeads,
    batch: FixedBatch,
    shape: Shape,
    tables: GridTables,
    pool_patches: Tensor,
    pool_marks: Tensor,
    *,
    families: int,
    way: Way = PLAIN,
) -> Losses:
    """Of a batch whose pictures lie in the pool's rows, as uint8 [rows, pixels] and [rows, channels]."""
    attend = SliceAttention(batch.starts, shape.patches, QUERIES, packed=way.packed)
    real_slice = batch.sources >= 0
    real = real_slice.index_select(0, attend.slice_of)
    rows = batch.sources.clamp(min=0).long().index_select(0, attend.slice_of) + attend.offset
    patches = normalise(pool_patches.index_select(0, rows), model.norm_mean, model.norm_std, model.dtype)
    # What padding reads was never written, or is another example's: no class at all.
    marks = pool_marks.index_select(0, rows) * real[:, None]
    seen, embeddings = see(model, patches, batch, tables, attend)
    hidden = hidden_states(model, batch, shape, embeddings, way)
    # The next token of a row's last place is another row's first: nothing is trained there.
    targets = batch.ids.roll(-1).long()
    weighted = cross_entropy(model.logits(hidden), targets, reduction="none") * batch.weights
    of_family = batch.family == torch.arange(families, device=hidden.device)[:, None]
    by_family = of_family.float() @ torch.stack((weighted.detach(), batch.weights), dim=1)
    near, halves = _near(batch, tables)
    real_query = real_slice[:, None].expand(-1, QUERIES).flatten()
    return Losses(
        answers=weighted.sum() / batch.weights.sum().clamp(min=1e-6),
        patches=heads.patch_loss(seen, marks, real),
        queries=heads.query_loss(embeddings, marks[near], marks[:, 3:].flatten()[halves], real_query),
        by_family=by_family,
    )


def _near(batch: FixedBatch, tables: GridTables) -> tuple[Tensor, Tensor]:
    """Rows of the batch's patches, and of their halves, in each query's cell."""
    starts, grids = batch.starts[:-1, None, None].long(), batch.grids.long()
    near = tables.near.index_select(0, grids) + starts
    halves = tables.halves.index_select(0, grids) + 2 * starts
    return near.flatten(0, 1), halves.flatten(0, 1)
