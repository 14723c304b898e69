"""Random numbers that depend on nothing but a key and an index: a request's draws are the same alone or in a
batch, on any device, whatever else runs, for the whole vocabulary or for a few candidates of it.

A counter-based generator: the finaliser of splitmix64 (Steele et al. 2014) over key + index * golden ratio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def mix(*parts: int) -> int:
    """One 64-bit key (signed, as torch holds it) of several integers."""
    state = 0
    for part in parts:
        state = _mix_one((state + part * _GOLDEN + 1) & _MASK)
    return _signed(state)


def mix_further(states: NDArray[np.uint64], parts: NDArray[np.uint64]) -> NDArray[np.int64]:
    """`mix(*earlier, part)` for many at once, where each of `states` is `mix(*earlier)`."""
    state = states + parts * np.uint64(_GOLDEN) + np.uint64(1)
    for shift, multiplier in _ROUNDS:
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(multiplier)
    keys: NDArray[np.int64] = (state ^ (state >> np.uint64(_LAST_SHIFT))).view(np.int64)
    return keys


def hash_bits(keys: Tensor, indices: Tensor) -> Tensor:
    """64 random bits for keys int64 [R, 1] and indices int64 [R, C] or [C]: int64 [R, C]."""
    state = keys + indices * _signed(_GOLDEN)
    for shift, multiplier in _ROUNDS:
        state.bitwise_xor_(_shift_right(state, shift)).mul_(_signed(multiplier))
    return state.bitwise_xor_(_shift_right(state, _LAST_SHIFT))


def exponential(keys: Tensor, indices: Tensor) -> Tensor:
    """Exponential(1) noise, float32 [R, C]: argmax(weight / noise) draws in proportion to the weights.

    Keys and indices as in `hash_bits`. 40 random bits stand behind each number, so that small ones, which decide
    among unlikely tokens, have a float's full precision.
    """
    uniform = _shift_right(hash_bits(keys, indices), 24).to(torch.float32).add_(0.5).mul_(2.0**-40)
    # What rounds to 1 would be infinite noise, and no token at all where only one may be drawn.
    return uniform.clamp_(max=1.0 - 2.0**-24).neg_().log1p_().neg_()


def _mix_one(state: int) -> int:
    for shift, multiplier in _ROUNDS:
        state = ((state ^ (state >> shift)) * multiplier) & _MASK
    return state ^ (state >> _LAST_SHIFT)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
