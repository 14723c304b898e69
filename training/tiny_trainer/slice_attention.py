"""Attention within each slice of a batch of fixed shape: by torch's kernel for packed sequences, or padded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tiny_trainer.grids import LONGEST


class SliceAttention:
    """`starts` int32 [slices + 1] says where each slice's patches begin; none has more than LONGEST.

    Attributes:
        slice_of: [patches] the slice of each patch.
        offset: [patches] its number there.
    """

    def __init__(self, starts: Tensor, patches: int, queries: int, *, packed: bool) -> None:
        self.starts, self.queries, self.packed = starts, queries, packed
        self.slices = len(starts) - 1
        each = torch.arange(patches, device=starts.device, dtype=torch.int32)
        self.slice_of = torch.searchsorted(starts[1:], each, right=True)
        self.offset = (each - starts[:-1].index_select(0, self.slice_of)).long()

    def within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Patches [patches, heads, head_dim] see those of their own slice."""
        if self.packed:
            return _packed(q, k, v, self.starts, self.starts, LONGEST)
        out = self._padded(self._spread(q), k, v)
        return out.index_select(0, self.slice_of * LONGEST + self.offset)

    def across(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [slices * queries, heads, head_dim] see the patches of their slice."""
        if self.packed:
            ends = torch.arange(self.slices + 1, device=q.device, dtype=torch.int32) * self.queries
            return _packed(q, k, v, ends, self.starts, self.queries)
        return self._padded(q.unflatten(0, (self.slices, self.queries)), k, v)

    def _spread(self, x: Tensor) -> Tensor:
        """[patches, …] -> [slices, LONGEST, …]; what is past a slice's end is another slice's, and masked."""
        at = self.starts[:-1, None] + torch.arange(LONGEST, device=x.device)
        return x.index_select(0, at.clamp(max=len(x) - 1).flatten()).unflatten(0, (self.slices, LONGEST))

    def _padded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = self.starts[1:] - self.starts[:-1]
        there = torch.arange(LONGEST, device=q.device) < sizes[:, None]
        # Not -inf: rows of nothing else make the gradients of fused kernels NaN.
        bias = torch.zeros(there.shape, dtype=q.dtype, device=q.device).masked_fill_(~there, -30000.0)
        mask = bias[:, None, None].expand(-1, -1, q.shape[1], -1)
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            self._spread(k).transpose(1, 2),
            self._spread(v).transpose(1, 2),
            attn_mask=mask,
        )
        return out.transpose(1, 2).flatten(0, 1)


def _packed(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), q_starts, k_starts, longest, LONGEST)
    assert isinstance(out, Tensor)
    return out


def check(
    starts: Tensor,
    patches: int,
    queries: int,
    within: tuple[int, int],
    across: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """AssertionError unless packed attention, forwards and backwards, gives each patch and query of this batch what
    padded attention gives in float32, but for rounding.

    Args:
        within, across: (heads, head_dim) of the encoder and of the resampler.
    """
    generator = torch.Generator().manual_seed(0)
    ours, plain = (SliceAttention(starts, patches, queries, packed=packed) for packed in (True, False))
    for name, (heads, width), asking in (
        ("within", within, patches),
        ("across", across, ours.slices * queries),
    ):
        given = [
            torch.randn(count, heads, width, generator=generator).to(starts.device, dtype)
            for count in (asking, patches, patches, asking)
        ]
        results = []
        for attend, kind in ((plain, torch.float32), (ours, dtype)):
            q, k, v = own = [t.to(kind).requires_grad_() for t in given[:3]]
            out = getattr(attend, name)(q, k, v)
            gradients = torch.autograd.grad(out, own, given[3].to(kind))
            results.append([t.detach().float().flatten(1) for t in (out, *gradients)])
        for part, expected, found in zip(("out", "dq", "dk", "dv"), *results, strict=True):
            size = expected.norm(dim=1)
            worst = ((found - expected).norm(dim=1) / (size + size.median())).max().item()
            assert worst < 0.05, f"{part} of attention {name} slices is off by {worst:.3f} of its size"
