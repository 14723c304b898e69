"""Rows of which nothing is asked but the likeliest token: all of a step's at once, without an object for each."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

import torch

from huoyan.engine.answer import ChosenToken
from huoyan.engine.host_copy import HostCopy
from huoyan.kernels import decode_kernels_enabled

if TYPE_CHECKING:
    from torch import Tensor


class LikeliestTokens:
    """See `huoyan.engine.sampler.SampledTokens`: `ids` int64 [R] on the device at once, the rest when it is read."""

    @torch.inference_mode()
    def __init__(self, logits: Tensor) -> None:
        """`logits`: float32 [R, vocab], as the model has them. Of equal ones the lowest id is taken."""
        self._rows = len(logits)
        found = _likeliest(logits)
        self.ids = found[: 2 * self._rows].view(torch.int64)
        self._copy = HostCopy(found)

    def read(self) -> list[ChosenToken]:
        """Waits until they are chosen."""
        (found,) = self._copy.read()
        ids = found[: 2 * self._rows].view(torch.int64).tolist()
        logprobs = found[2 * self._rows :].view(torch.float32).tolist()
        return list(map(ChosenToken._make, zip(ids, logprobs, repeat(None), strict=False)))


def _likeliest(logits: Tensor) -> Tensor:
    """See `huoyan.kernels.likeliest.likeliest`."""
    if logits.is_cuda and decode_kernels_enabled():
        from huoyan.kernels.likeliest import likeliest

        return likeliest(logits)
    return likeliest_reference(logits)


def likeliest_reference(logits: Tensor) -> Tensor:
    """The same in plain PyTorch, in three passes."""
    ids = logits.argmax(-1)
    own = logits.gather(1, ids.unsqueeze(1)).squeeze(1)
    return torch.cat([ids.view(torch.int32), (own - logits.logsumexp(-1)).view(torch.int32)])
