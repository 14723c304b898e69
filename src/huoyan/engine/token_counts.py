"""Which tokens a sequence has, and how often: what penalties need to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ROOM = 64


class TokenCounts:
    """The distinct tokens of a prompt and its answer. Kept up to date token by token, on the host.

    A few hundred of a vocabulary's 150 000 tokens occur in a sequence, and penalties touch no others.
    """

    def __init__(self, prompt_ids: Sequence[int] | NDArray[np.int64]) -> None:
        distinct = np.unique(np.asarray(prompt_ids, np.int64))
        self._ids = np.concatenate([distinct, np.zeros(_ROOM, np.int64)])
        self._counts = np.zeros(len(self._ids), np.float32)
        self._size = len(distinct)
        self._place = {token: i for i, token in enumerate(distinct.tolist())}
        self._known = 0

    @property
    def ids(self) -> NDArray[np.int64]:
        """[N]: distinct tokens of prompt and answer."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """[N]: how often the answer has each of `ids`."""
        return self._counts[: self._size]

    def update(self, output_ids: Sequence[int]) -> None:
        """Count the answer's tokens that came since the last call; `output_ids` are all of them."""
        for token in output_ids[self._known :]:
            place = self._place.setdefault(token, self._size)
            if place == self._size:
                if place == len(self._ids):
                    self._ids = np.concatenate([self._ids, np.zeros(place, np.int64)])
                    self._counts = np.concatenate([self._counts, np.zeros(place, np.float32)])
                self._ids[place] = token
                self._counts[place] = 0
                self._size += 1
            self._counts[place] += 1
        self._known = len(output_ids)

    def fork(self) -> TokenCounts:
        """For a sequence that goes its own way."""
        twin = TokenCounts.__new__(TokenCounts)
        twin._ids = self._ids.copy()
        twin._counts = self._counts.copy()
        twin._size = self._size
        twin._place = self._place.copy()
        twin._known = self._known
        return twin
