"""The trial of the beam kernels passes where they are right, and tells where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from huoyan.engine import beam_ops_cuda
from huoyan.engine.beam_ops_cuda import KernelBeamOps
from huoyan.engine.beam_probe import probe
from huoyan.engine.kv_cache import KVCache

VOCAB = 5003


def cache(device: torch.device, kv_cache_dtype: str = "int8", block_size: int = 4) -> KVCache:
    return KVCache(3, 50, block_size, 2, 16, torch.float16, device, kv_cache_dtype)


@pytest.mark.parametrize("width", [2, 3, 8, 9])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_right_kernels_pass(device: torch.device, width: int, kv_cache_dtype: str) -> None:
    for block_size in (1, 16):
        probe(KernelBeamOps(), cache(device, kv_cache_dtype, block_size), VOCAB, width)


def test_wrong_kernels_do_not(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_nothing(stored: Tensor, sources: Tensor, targets: Tensor) -> None:
        pass

    monkeypatch.setattr(beam_ops_cuda, "copy_blocks", copy_nothing)
    with pytest.raises(RuntimeError, match="plain way"):
        probe(KernelBeamOps(), cache(device), VOCAB, 3)
    monkeypatch.undo()

    def decide_backwards(orders: object, found: Tensor, before: Tensor | None) -> Tensor:
        state = right(orders, found, before)  # type: ignore[arg-type]
        found[:, :, 1] = found[:, :, 1].flip(1)
        return state

    right = beam_ops_cuda.beam_advance
    monkeypatch.setattr(beam_ops_cuda, "beam_advance", decide_backwards)
    with pytest.raises(RuntimeError, match="plain way"):
        probe(KernelBeamOps(), cache(device), VOCAB, 3)
