"""One drawn example, ready to be put in a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from huoyan.models.patches import Grid


@dataclass(frozen=True, eq=False)
class Record:
    """Slices and tokens of one example.

    The tokens are a common beginning (system turn, pictures) followed by its branches, one for each
    question and answer; positions go on from the beginning in every branch.
    """

    family: str
    patches: NDArray[np.uint8]
    """[P, 3 * patch_size**2], all slices end to end."""
    marks: NDArray[np.uint8]
    """[P, pictures.CHANNELS]: what is drawn in each patch, 0 for nothing (see `pictures.paint`)."""
    grids: tuple[Grid, ...]
    """(rows, columns) of each slice."""
    ids: NDArray[np.int16]
    """[L]"""
    positions: NDArray[np.int16]
    """[L]"""
    branch: NDArray[np.int8]
    """[L]: 0 for the beginning, 1, 2, … for its continuations."""
    weights: NDArray[np.float32]
    """[L]: how much it counts to predict the next token here; 0 outside answers."""
