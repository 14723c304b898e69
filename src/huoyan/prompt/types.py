"""What the prompt stage hands on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PictureSlot:
    """Where one picture's embeddings go: `offsets[s]` is where the run of `length` placeholder tokens of
    slice `s` (overview first) begins in the prompt's token ids."""

    offsets: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the engine takes it. `slots[i]` belongs to the request's i-th picture."""

    token_ids: list[int]
    slots: tuple[PictureSlot, ...] = ()
    text: str | None = None
