"""How the rows of a step are drawn that depend on nothing but logits, parameters and a key: what stays the same from
step to step is kept, on the device too, as long as the sequences are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from huoyan.api.sampling_params import SAMPLING_EPS
from huoyan.engine.draw import has_filters
from huoyan.engine.noise import mix, mix_further
from huoyan.layers.packed_attention import to_device

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from huoyan.engine.sequence import Group, Sequence
    from huoyan.kernels.choose_rows import Draws


@dataclass
class _Kept:
    """Of some sequences, a row each."""

    sequences: list[Sequence]
    states: NDArray[np.uint64]
    """What their keys begin with: seed and place in the request."""
    temperature: Tensor
    """float32, 0 for the likeliest."""
    filters: tuple[Tensor, Tensor, Tensor] | None
    """top_k int32, top_p, min_p float32, where one of them filters."""


class PlainDraws:
    """`draws(logits, sequences)` for one engine."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._kept: _Kept | None = None

    def draws(self, logits: Tensor, index: Tensor | None, sequences: list[Sequence]) -> Draws | None:
        """Of rows `index` of the logits (None: all), one for each of `sequences`; None where each takes the likeliest
        token.

        Call it when the step counts as launched, before the host learns its tokens.
        """
        from huoyan.kernels.choose_rows import Draws
        from huoyan.kernels.sampling_floors import sampling_floors

        if all(seq.group.takes_likeliest or seq.group.takes_likeliest_but for seq in sequences):
            return None
        kept = self._kept
        if kept is None or kept.sequences != sequences:
            kept = self._kept = self._keep(sequences, logits.device)
        steps = np.array([seq.num_outputs - 1 for seq in sequences], np.uint64)
        keys = torch.from_numpy(mix_further(kept.states, steps))
        floors = None
        if kept.filters is not None:
            floors = sampling_floors(logits, kept.temperature, *kept.filters, index)
        return Draws(kept.temperature, to_device(keys, logits.device), floors)

    def request_key(self, group: Group) -> int:
        """What the keys of a request's draws are made of, with the place of an answer in it and its number of tokens:
        its seed, or where it has none the engine's and its order."""
        seed = group.params.seed
        return mix(1, seed) if seed is not None else mix(0, self._seed, group.order)

    def key_state(self, seq: Sequence) -> int:
        """What is mixed with the number of an answer's tokens to make the key of a draw (see `mix`)."""
        return mix(self.request_key(seq.group), seq.index)

    def _keep(self, sequences: list[Sequence], device: torch.device) -> _Kept:
        old = self._kept
        known = dict(zip(old.sequences, old.states.tolist(), strict=True)) if old is not None else {}
        states = [
            known[seq] if seq in known else self.key_state(seq) & 0xFFFFFFFFFFFFFFFF for seq in sequences
        ]
        params = [seq.group.params for seq in sequences]

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return to_device(torch.tensor(values, dtype=dtype), device)

        filters = None
        if any(map(has_filters, params)):
            filters = (
                column([p.top_k for p in params], torch.int32),
                column([p.top_p for p in params]),
                column([p.min_p for p in params]),
            )
        warm = [p.temperature if p.temperature >= SAMPLING_EPS else 0.0 for p in params]
        return _Kept(sequences, np.array(states, np.uint64), column(warm), filters)
