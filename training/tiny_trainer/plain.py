"""Answering without kernels of our own, where those do not work."""

from __future__ import annotations

from huoyan.layers import fused, linear
from huoyan.layers.packed_attention import packed_attention_by_runs
from huoyan.models import resampler, siglip


def use_plain_operators() -> None:
    """Run the product's modules in plain PyTorch from now on, for the whole process."""
    fused._use_kernel = lambda x: False
    linear.reads_few_rows = lambda x, width_in: False
    for owner in (siglip, resampler):
        owner.packed_attention = packed_attention_by_runs  # type: ignore[attr-defined]
