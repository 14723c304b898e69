"""The loss of one step: answer tokens, and what the auxiliary heads must name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from huoyan.models.minicpmv import MiniCPMV
from tiny_trainer.attention import BranchedAttention
from tiny_trainer.auxiliary import AuxiliaryHeads, Near
from tiny_trainer.batches import Group, TextBatch


@dataclass(frozen=True, eq=False)
class Losses:
    """`answers` is the mean over weighted answer tokens; `by_example` [examples, 2] holds (weighted sum, weight)."""

    answers: Tensor
    patches: Tensor
    queries: Tensor
    by_example: Tensor


def hidden_states(model: MiniCPMV, group: Group, embeddings: Tensor, bias: Tensor) -> Tensor:
    """embeddings [slots, hidden] of this group's pictures -> [rows * L, hidden]."""
    x = model.embed(group.ids)
    x = x.index_copy(0, group.slots, embeddings.to(x.dtype))
    return model.decoder(x, group.positions, BranchedAttention(bias))


def compute_losses(
    model: MiniCPMV,
    heads: AuxiliaryHeads,
    patches: Tensor,
    marks: Tensor,
    near: Near,
    text: TextBatch,
) -> Losses:
    """patches [P, pixels] normalised, marks [P, channels], all in the batch's order."""
    seen = model.vpm(patches, text.grids)
    embeddings = model.resampler(seen, text.grids)
    flat = embeddings.flatten(0, 1)
    examples = len(text.order)
    by_example = torch.zeros(examples, 2, device=flat.device)
    total = flat.new_zeros((), dtype=torch.float32)
    weight = flat.new_zeros((), dtype=torch.float32)
    for group in text.groups:
        own = flat[group.first_embedding : group.first_embedding + len(group.slots)]
        hidden = hidden_states(model, group, own, group.bias(flat.dtype))
        loss = cross_entropy(model.logits(hidden[group.predict]), group.targets, reduction="none")
        weighted = loss * group.weights
        total = total + weighted.sum()
        weight = weight + group.weights.sum()
        by_example.index_add_(0, group.example, torch.stack((weighted.detach(), group.weights), dim=1))
    return Losses(
        answers=total / weight.clamp(min=1e-6),
        patches=heads.patch_loss(seen, marks),
        queries=heads.query_loss(flat, marks, near),
        by_example=by_example,
    )
