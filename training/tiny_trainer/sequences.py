"""From questions and answers about cut pictures to token sequences, as the product encodes prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from huoyan.media.types import SlicePlan, SliceRules

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER = "<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
STOP = "<|im_end|>"

VIDEO_SLICES = 2
MANY_FRAMES = 16
_MOST_ENCODED = 30_000


def video_max_slices(frames: int) -> int:
    """Frames of a video are cut into at most this many slices."""
    return VIDEO_SLICES if frames <= MANY_FRAMES else 1


@dataclass(frozen=True, eq=False)
class TokenRow:
    """Tokens of one record: see `Record`."""

    ids: NDArray[np.int16]
    positions: NDArray[np.int16]
    branch: NDArray[np.int8]
    weights: NDArray[np.float32]


class SequenceBuilder:
    """Encodes with the tokenizer in `folder` (whose config files hold the slice rules)."""

    def __init__(self, folder: Path, rules: SliceRules) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.rules = rules
        self._encoded: dict[str, tuple[int, ...]] = {}
        self.slot_id = self._special("<unk>")
        self.stop_id = self._special(STOP)

    def _special(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no {token}")
        return int(found)

    def encode(self, text: str) -> list[int]:
        # Pictures' placeholders and questions come again and again. (A cache of functools could not be pickled, as this
        # is for the processes that draw held-out examples.)
        found = self._encoded.get(text)
        if found is None:
            if len(self._encoded) >= _MOST_ENCODED:
                self._encoded.clear()
            found = self._encoded[text] = self._encode(text)
        return list(found)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def placeholder(self, plan: SlicePlan, index: int | None) -> str:
        """The text one picture becomes; `index` is its number in the prompt, None for a video's frame."""
        run = "<unk>" * self.rules.image_feature_size
        text = "" if index is None else f"<image_id>{index}</image_id>"
        text += f"<image>{run}</image>"
        if plan.grid is not None:
            columns, rows = plan.grid
            text += "\n".join([f"<slice>{run}</slice>" * columns] * rows)
        return text

    def beginning(self, plans: Sequence[SlicePlan], kind: str, *, between: str = "\n") -> list[int]:
        """Ids up to the end of the pictures. `kind` is "image" or "video".

        A video's frames stand on lines of their own in a conversation; where a prompt has the one
        placeholder that vLLM's users write, nothing is between them.
        """
        if kind == "video":
            pictures = between.join(self.placeholder(plan, None) for plan in plans)
        else:
            pictures = "\n".join(self.placeholder(plan, i) for i, plan in enumerate(plans))
        return self.encode(SYSTEM + USER + pictures if plans else SYSTEM)

    def question(self, text: str, *, pictures: bool = True) -> list[int]:
        """Ids from the end of the pictures (or of the system turn) to where the answer begins."""
        return self.encode(("\n" if pictures else USER) + text + ASSISTANT)

    def follow_up(self, text: str) -> list[int]:
        """Ids between the stop token of an answer and the next answer of a conversation."""
        return self.encode("\n" + USER + text + ASSISTANT)

    def answer(self, text: str) -> list[int]:
        return [*self.encode(text), self.stop_id]

    def build(
        self,
        plans: Sequence[SlicePlan],
        kind: str,
        turns: Sequence[tuple[str, str]],
        *,
        conversation: bool = False,
        between: str = "\n",
    ) -> TokenRow:
        """Training tokens of all `turns`: a branch each, or one after the other as a conversation."""
        first = self.beginning(plans, kind, between=between)
        ids, positions = list(first), list(range(len(first)))
        branch, weights = [0] * len(first), [0.0] * len(first)
        at = len(first)
        for number, (question, answer) in enumerate(turns, 1):
            later = conversation and number > 1
            asked = self.follow_up(question) if later else self.question(question, pictures=bool(plans))
            answered = self.answer(answer)
            if not conversation:
                at = len(first)
            ids += asked + answered
            positions += range(at, at + len(asked) + len(answered))
            branch += [1 if conversation else number] * (len(asked) + len(answered))
            # A long answer counts more than a short one, but not by its length.
            weight = len(answered) ** -0.5
            weights += [0.0] * (len(asked) - 1) + [weight] * len(answered) + [0.0]
            at += len(asked) + len(answered)
        return TokenRow(
            np.array(ids, dtype=np.int16),
            np.array(positions, dtype=np.int16),
            np.array(branch, dtype=np.int8),
            np.array(weights, dtype=np.float32),
        )
