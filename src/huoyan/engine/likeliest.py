"""Rows of which nothing is asked but the likeliest token: all of a step's at once, without an object for each."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

import torch

from huoyan.engine.answer import ChosenToken
from huoyan.engine.host_copy import HostCopy

if TYPE_CHECKING:
    from torch import Tensor


def likeliest_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [R, vocab] -> the likeliest token of each row, of several the lowest id, int64 [R], and its
    log-probability, float32 [R]."""
    ids = logits.argmax(-1)
    own = logits.gather(1, ids.unsqueeze(1)).squeeze(1)
    return ids, own - logits.logsumexp(-1)


class LikeliestTokens:
    """See `huoyan.engine.sampler.SampledTokens`: `ids` int64 [R] on the device at once, the rest when it is read."""

    @torch.inference_mode()
    def __init__(self, logits: Tensor) -> None:
        """`logits`: float32 [R, vocab], as the model has them."""
        self.ids, logprobs = likeliest_reference(logits)
        self._copy = HostCopy(self.ids, logprobs)

    def read(self) -> list[ChosenToken]:
        """Waits until they are chosen."""
        ids, logprobs = self._copy.read()
        return list(map(ChosenToken._make, zip(ids.tolist(), logprobs.tolist(), repeat(None), strict=False)))
