"""torch's packed flash attention on CUDA, called as directly as it goes.

`torch.nn.attention.varlen.varlen_attn` is the public way to the same kernel; its Python takes the host longer than the
kernel takes the device (some 0.15 ms a call, and there are 55 for a picture's first token), and in torch 2.11 it has
no word for fewer key heads than query heads, which the kernel knows. Where the operator is not as we know it, the
public way is taken.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
) -> Tensor:
    """Attention of each sequence's queries over its own keys, sequences packed end to end.

    Args:
        q: [sum of queries, heads, head_dim]; float16 or bfloat16 on CUDA, the last dimension contiguous.
        k, v: [sum of keys, kv_heads, head_dim]; kv_heads divides heads.
        cu_q, cu_k: int32 [sequences + 1], where each begins.
        max_q, max_k: of the longest.
        causal: the last query sees all keys, the one before all but one, …

    Returns:
        [sum of queries, heads, head_dim]
    """
    if takes_grouped_heads():
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False
        )[0]
        return out
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    window = (-1, 0) if causal else (-1, -1)
    plain = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), cu_q, cu_k, max_q, max_k, window_size=window
    )
    assert isinstance(plain, Tensor)
    return plain


@lru_cache(maxsize=1)
def takes_grouped_heads() -> bool:
    """Whether the operator takes what we give it, fewer key heads than query heads among it, tried on a few numbers;
    else keys and values are repeated."""
    try:
        q = torch.randn(3, 4, 64, device="cuda").half()
        kv = torch.randn(3, 2, 64, device="cuda").half()
        cu = torch.tensor([0, 1, 3], dtype=torch.int32, device="cuda")
        got = torch.ops.aten._flash_attention_forward(q, kv, kv, cu, cu, 2, 2, 0.0, True, False)[0]
        each = kv.repeat_interleave(2, 1).float()
        # Not as matrix products: for those cuBLAS would keep a workspace of this stream, where nothing else runs.
        scores = (q.float().unsqueeze(1) * each).sum(-1).movedim(-1, 0) / 8
        seen = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.bool, device="cuda")
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        want = (weights.movedim(0, -1).unsqueeze(-1) * each).sum(1)
        fits = bool(torch.allclose(got.float(), want, rtol=1e-2, atol=1e-2))
    except Exception as error:
        log.warning("torch's flash attention is called the long way: %s", str(error).splitlines()[0])
        return False
    if not fits:
        log.warning("torch's flash attention is called the long way: its operator gives something else here")
    return fits
