"""Where training starts from.

The one thing that is not left to chance is where the resampler looks. Left to itself it first has to
discover that patches have places. Here 32 channels of the encoder carry a wave code of a patch's place as a
fraction of its slice, and query `8 * r + c` starts out looking for the code of cell (r, c) of an 8 by 8
lattice, so from the first step on every picture token shows its own part of the slice, whatever its shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from huoyan.models.minicpmv import MiniCPMV

LATTICE = 8
_WAVES = 8
_CODE = 4 * _WAVES
_LOGIT_OF_A_WAVE = 0.5
"""Attention logit each wave adds where it agrees: half of it within a cell's own patches, little elsewhere."""


@torch.no_grad()
def initialise(model: MiniCPMV, seed: int) -> None:
    """Fill a float32 model: small residual branches, queries that look at places."""
    generator = torch.Generator().manual_seed(seed)
    depth = {"vpm": model.config.vision.num_encoder_layers, "llm": model.config.text.num_hidden_layers}
    for name, p in model.named_parameters():
        part, leaf = name.split(".")[0], name.rpartition(".")[2]
        if p.dim() == 1:
            p.fill_(1.0 if leaf == "weight" else 0.0)
        elif "position_embedding" in name:
            p.normal_(0.0, 0.02, generator=generator)
        elif "embed_tokens" in name:
            p.normal_(0.0, 0.3, generator=generator)
        elif "lm_head" in name:
            p.normal_(0.0, 0.02, generator=generator)
        else:
            p.normal_(0.0, p.shape[1] ** -0.5, generator=generator)
            if any(end in name for end in ("o_proj", "down_proj", "self_attn.out_proj", "fc2")):
                p.mul_((2 * depth.get(part, 1)) ** -0.5)
    model.resampler.proj.mul_(0.3)
    _look_at_places(model)


def place_code(places: Tensor) -> Tensor:
    """[N, 2] (row, column) as fractions of a slice -> [N, 32], whose products fall off over a cell's width."""
    waves = torch.arange(1, _WAVES + 1) * torch.pi
    angles = places[:, :, None] * waves
    return torch.cat((angles.sin(), angles.cos()), dim=2).flatten(1)


def grid_places(side: int) -> Tensor:
    """[side², 2]: the middles of the cells of a side by side grid, row by row."""
    middle = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(middle, middle)


def _look_at_places(model: MiniCPMV) -> None:
    resampler, embeddings = model.resampler, model.vpm.embeddings
    width = resampler.query.shape[1]
    # The code's channels stay out of the first mixing: the patch embedding does not write to them.
    embeddings.position_embedding.weight[:, :_CODE] = place_code(grid_places(embeddings.side))
    embeddings.patch_embedding.weight[:_CODE] = 0
    # Keys get absolute sine-cosine positions added; in the slowest waves of each quarter those are constant.
    quarter = width // 4
    slow = torch.cat([torch.arange((n + 1) * quarter - _CODE // 4, (n + 1) * quarter) for n in range(4)])
    resampler.kv_proj.weight[slow] = 0
    resampler.kv_proj.weight[slow, torch.arange(_CODE)] = 2.0
    resampler.query.zero_()
    resampler.query[:, slow] = place_code(grid_places(LATTICE))
    w_q, w_k, _ = resampler.attn.in_proj_weight.chunk(3)
    w_q.mul_(0.1)
    w_k.mul_(0.1)
    head_width = width // resampler.attn.heads
    for head in range(resampler.attn.heads):
        rows = head * head_width + torch.arange(_CODE)
        for w in (w_q, w_k):
            w[rows] = 0
            w[rows, slow] = 1.0
    # What the norms make of the code's amplitude is measured, then the queries are scaled to match.
    grid = (16, 16)
    patches = torch.empty(256, embeddings.patch_embedding.width_in).normal_(
        0, 0.5, generator=torch.Generator().manual_seed(0)
    )
    keys = resampler.ln_kv(resampler.kv_proj(model.vpm(patches, [grid])))
    code = place_code(grid_places(16))
    gain = (keys[:, slow] * code).sum() / (code * code).sum()
    query_gain = (resampler.ln_q(resampler.query)[:, slow] * resampler.query[:, slow]).sum() / (
        resampler.query**2
    ).sum()
    scale = _LOGIT_OF_A_WAVE * head_width**0.5 / (gain * query_gain)
    for head in range(resampler.attn.heads):
        w_q[head * head_width : head * head_width + _CODE] *= scale
