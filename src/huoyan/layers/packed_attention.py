"""Attention over sequences packed end to end: each attends within itself only, nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from huoyan.kernels import decode_kernels_enabled
from huoyan.layers.varlen_attention import varlen_attention

_WIDEST_FLASH = 256
"""Head of torch's flash attention."""


class Lengths(tuple[int, ...]):
    """Lengths of sequences packed end to end. Where each begins is sent to a device once and kept, so that the layers
    of a model share it and a CUDA graph may read it."""

    @classmethod
    def of_device(cls, starts: Tensor, longest: int) -> Lengths:
        """Lengths that only the device knows: where each sequence begins, int32 [sequences + 1], and no sequence is
        longer than `longest`. For packed attention on CUDA alone, which asks for no more."""
        found = cls([longest] * (len(starts) - 1))
        found.__dict__["_cumulative"] = {starts.device: starts}
        return found

    def cumulative(self, device: torch.device) -> Tensor:
        """int32 [sequences + 1]"""
        known: dict[torch.device, Tensor] = self.__dict__.setdefault("_cumulative", {})
        if device not in known:
            host = torch.tensor([0, *accumulate(self)], dtype=torch.int32, device="cpu")
            known[device] = to_device(host, device)
        return known[device]


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lengths: Sequence[int],
    k_lengths: Sequence[int],
    bias: Tensor | None = None,
    over: bool = False,
) -> Tensor:
    """Full attention of sequence s's queries over sequence s's keys.

    Args:
        q: [sum(q_lengths), heads, head_dim]
        k, v: [sum(k_lengths), heads, head_dim]
        bias: [3 * heads * head_dim], still to be added to q, k and v.
        over: the answers may be written over q.

    Returns:
        [sum(q_lengths), heads, head_dim]
    """
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= _WIDEST_FLASH
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and fits:
        if q_lengths is k_lengths and _suits_our_kernel(q, k, v):
            from huoyan.kernels.slice_attention import slice_attention

            return slice_attention(q, k, v, _cumulative(q_lengths, q.device), max(q_lengths), bias, over=over)
        q, k, v = _with_bias(q, k, v, bias)
        return _varlen(q, k, v, q_lengths, k_lengths)
    q, k, v = _with_bias(q, k, v, bias)
    return packed_attention_by_runs(q, k, v, q_lengths, k_lengths)


def _with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if bias is None:
        return q, k, v
    own = bias.view(3, *q.shape[1:])
    return q + own[0], k + own[1], v + own[2]


def packed_attention_by_runs(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]
) -> Tensor:
    """One batched call for each run of neighbours of the same lengths (callers sort to make runs long)."""
    out = torch.empty_like(q) if not q.requires_grad else None
    parts = []
    q_at = k_at = 0
    for (q_len, k_len), run in groupby(zip(q_lengths, k_lengths, strict=True)):
        count = sum(1 for _ in run)
        q_end, k_end = q_at + count * q_len, k_at + count * k_len
        o = scaled_dot_product_attention(
            q[q_at:q_end].unflatten(0, (count, q_len)).transpose(1, 2),
            k[k_at:k_end].unflatten(0, (count, k_len)).transpose(1, 2),
            v[k_at:k_end].unflatten(0, (count, k_len)).transpose(1, 2),
        )
        o = o.transpose(1, 2).flatten(0, 1)
        if out is None:
            parts.append(o)
        else:
            out[q_at:q_end] = o
        q_at, k_at = q_end, k_end
    return out if out is not None else torch.cat(parts)


def _varlen(q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Tensor:
    cu_q, cu_k = (_cumulative(lengths, q.device) for lengths in (q_lengths, k_lengths))
    return varlen_attention(q, k, v, cu_q, cu_k, max(q_lengths), max(k_lengths))


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return (lengths if isinstance(lengths, Lengths) else Lengths(lengths)).cumulative(device)


def _suits_our_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Heads of a width that flash attention would fill up, side by side in rows of one stride."""
    if not decode_kernels_enabled() or torch.is_grad_enabled():
        return False
    from huoyan.kernels.slice_attention import takes

    head_dim = q.shape[-1]
    return takes(head_dim) and q.stride() == k.stride() == v.stride() == (q.stride(0), head_dim, 1)
