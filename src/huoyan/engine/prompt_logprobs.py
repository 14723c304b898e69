"""Log-probabilities of a prompt's own tokens, a piece of the vocabulary projection at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from huoyan.api.outputs import Logprob
from huoyan.planning.pieces import PROMPT_LOGITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from huoyan.api.outputs import TokenLogprobs


@torch.inference_mode()
def prompt_logprobs(
    hidden: Tensor, next_ids: Tensor, project: Callable[[Tensor], Tensor], vocab_size: int, top: int
) -> Iterator[TokenLogprobs]:
    """For each row of `hidden: [T, hidden]` the `top` likeliest tokens, and the one in `next_ids: [T]`.

    `project` maps [rows, hidden] to float32 logits [rows, vocab]. Log-probabilities are those of the model,
    before temperature and penalties. Ranks count from 1.
    """
    step = max(PROMPT_LOGITS // vocab_size, 1)
    for first in range(0, len(hidden), step):
        logprobs = project(hidden[first : first + step]).log_softmax(-1)
        ids = next_ids[first : first + step]
        own = logprobs.gather(1, ids[:, None])
        ranks = (logprobs > own).sum(1) + 1
        best = logprobs.topk(top, 1)
        for own_id, own_value, rank, values, indices in zip(
            ids.tolist(),
            own[:, 0].tolist(),
            ranks.tolist(),
            best.values.tolist(),
            best.indices.tolist(),
            strict=True,
        ):
            entry = {i: Logprob(v, r) for r, (i, v) in enumerate(zip(indices, values, strict=True), 1)}
            entry.setdefault(own_id, Logprob(own_value, rank))
            yield entry
