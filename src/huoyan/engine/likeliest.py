"""Rows of which nothing is asked but the likeliest token: all of a step's at once, without an object for each."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

import torch

from huoyan.engine.answer import ChosenToken
from huoyan.engine.host_copy import HostCopy
from huoyan.kernels import decode_kernels_enabled
from huoyan.planning.pieces import CHOICE_LOGITS

if TYPE_CHECKING:
    from torch import Tensor


class LikeliestTokens:
    """See `huoyan.engine.sampler.SampledTokens`: `ids` int64 [R] on the device at once, the rest when it is read."""

    @torch.inference_mode()
    def __init__(self, logits: Tensor) -> None:
        """`logits`: [R, vocab], as the model has them. Of equal ones the lowest id is taken."""
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
    """The same in plain PyTorch, in three passes over a piece of the rows at a time."""
    ids, logprobs = [], []
    for some in logits.split(max(CHOICE_LOGITS // logits.shape[1], 1)):
        piece = some.float()
        best = piece.argmax(-1)
        own = piece.gather(1, best.unsqueeze(1)).squeeze(1)
        ids.append(best.view(torch.int32))
        logprobs.append((own - piece.logsumexp(-1)).view(torch.int32))
    return torch.cat([*ids, *logprobs])
