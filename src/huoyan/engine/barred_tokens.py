"""Tokens that rows of a step may not take, as the kernels that choose want them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from huoyan.layers.packed_attention import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence as Several

    from torch import Tensor

    from huoyan.engine.sequence import Sequence


class BarredTokens:
    """What was sent last stays on the device, for steps that say the same, as most do: nothing of it is copied then,
    which the kernels around would wait for."""

    def __init__(self) -> None:
        self._said: tuple[torch.device, list[tuple[int, ...]]] | None = None
        self._sent: Tensor | None = None

    def of(self, sequences: Several[Sequence], device: torch.device) -> Tensor | None:
        """int32 [sequences, most]: what each may not say before its `min_tokens`, filled up with -1; None for nothing.

        Nobody may write to it.
        """
        held = [
            tuple(seq.answer.rules.held_back)
            if seq.group.takes_likeliest_but and seq.num_outputs - 1 < seq.group.params.min_tokens
            else ()
            for seq in sequences
        ]
        most = max(map(len, held))
        if not most:
            return None
        # All that the tensor is made of, so that it cannot be another's.
        said = (device, held)
        if self._sent is None or said != self._said:
            # A power of two, so that the kernel has few forms.
            width = 1 << (most - 1).bit_length()
            table = torch.tensor([[*ids, *[-1] * (width - len(ids))] for ids in held], dtype=torch.int32)
            self._said, self._sent = said, to_device(table, device)
        return self._sent
