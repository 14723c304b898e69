"""Tokens of rows whose requests ask for nothing but the likeliest one, or a draw: all of a step's at once, without an
object for each."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

import torch

from huoyan.engine.answer import ChosenToken
from huoyan.engine.host_copy import HostCopy
from huoyan.kernels import decode_kernels_enabled
from huoyan.kernels.chosen import ids_and_logprobs
from huoyan.planning.pieces import CHOICE_LOGITS

if TYPE_CHECKING:
    from torch import Tensor

    from huoyan.kernels.choose_rows import Draws


def chooses_by_kernel(logits: Tensor) -> bool:
    """Whether rows of these are chosen from by our kernels, which also draw."""
    return logits.is_cuda and decode_kernels_enabled()


class PlainTokens:
    """See `huoyan.engine.sampler.SampledTokens`: `ids` int64 [R] on the device at once, the rest when it is read."""

    @torch.inference_mode()
    def __init__(
        self,
        logits: Tensor,
        draws: Draws | None = None,
        index: Tensor | None = None,
        barred: Tensor | None = None,
    ) -> None:
        """`logits`: [rows, vocab], as the model has them; `index`: which of its rows, int64 [R], None for all;
        `draws`: of rows that are drawn, `barred`: int32 [R, B], tokens that are not to be chosen (-1: none), both
        where kernels choose."""
        self._rows = len(logits if index is None else index)
        if draws is not None or barred is not None or chooses_by_kernel(logits):
            from huoyan.kernels.choose_rows import choose_rows

            # Written there by the kernel: a copy between kernels would hold up what comes next.
            seen = torch.empty(3 * self._rows, dtype=torch.int32, pin_memory=logits.is_cuda)
            found = choose_rows(logits, draws, index, barred, seen)
            self._copy = HostCopy.written(seen, logits.device)
        else:
            found = likeliest_reference(logits, index)
            self._copy = HostCopy(found)
        self.ids, _ = ids_and_logprobs(found)

    def read(self) -> list[ChosenToken]:
        """Waits until they are chosen."""
        (found,) = self._copy.read()
        ids, logprobs = (part.tolist() for part in ids_and_logprobs(found))
        return list(map(ChosenToken._make, zip(ids, logprobs, repeat(None), strict=False)))


def likeliest_reference(logits: Tensor, index: Tensor | None = None) -> Tensor:
    """See `huoyan.kernels.choose_rows.choose_rows`: the likeliest tokens in plain PyTorch, in three passes over a piece
    of the rows at a time."""
    step = max(CHOICE_LOGITS // logits.shape[1], 1)
    ids, logprobs = [], []
    for first in range(0, len(logits if index is None else index), step):
        rows = slice(first, first + step)
        piece = (logits[rows] if index is None else logits[index[rows]]).float()
        best = piece.argmax(-1)
        own = piece.gather(1, best.unsqueeze(1)).squeeze(1)
        ids.append(best.view(torch.int32))
        logprobs.append((own - piece.logsumexp(-1)).view(torch.int32))
    return torch.cat([*ids, *logprobs])
