"""torch's packed flash attention on CUDA, called as directly as it goes.

`torch.nn.attention.varlen.varlen_attn` is the public way to the same kernel; its Python takes the host longer than the
kernel takes the device (some 0.15 ms a call). Where the operator is not as we know it, the public way is taken.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """Attention of each sequence's queries over its own keys, sequences packed end to end.

    Args:
        q: [sum of queries, heads, head_dim]; float16 or bfloat16 on CUDA, the last dimension contiguous.
        k, v: [sum of keys, heads, head_dim].
        cu_q, cu_k: int32 [sequences + 1], where each begins.
        max_q, max_k: of the longest.

    Returns:
        [sum of queries, heads, head_dim]
    """
    if _operator_is_known():
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, False, False
        )[0]
        return out
    from torch.nn.attention.varlen import varlen_attn

    plain = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), cu_q, cu_k, max_q, max_k)
    assert isinstance(plain, Tensor)
    return plain


@lru_cache(maxsize=1)
def _operator_is_known() -> bool:
    """Whether the operator takes and gives what we think, tried on a few numbers."""
    try:
        q, k, v = torch.randn(3, 3, 2, 64, device="cuda").half()
        cu = torch.tensor([0, 1, 3], dtype=torch.int32, device="cuda")
        got = torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, 2, 2, 0.0, False, False)[0]
        # Not as matrix products: for those cuBLAS would keep a workspace of this stream, where nothing else runs.
        scores = (q.float().unsqueeze(1) * k.float()).sum(-1).movedim(-1, 0) / 8
        seen = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=torch.bool, device="cuda")
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        want = (weights.movedim(0, -1).unsqueeze(-1) * v.float()).sum(1)
        fits = bool(torch.allclose(got.float(), want, rtol=1e-2, atol=1e-2))
    except Exception as error:
        log.warning("torch's flash attention is called the long way: %s", str(error).splitlines()[0])
        return False
    if not fits:
        log.warning("torch's flash attention is called the long way: its operator gives something else here")
    return fits
