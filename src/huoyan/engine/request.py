"""A request as the engine takes it: token ids, prepared pictures, parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from huoyan.errors import InputError

if TYPE_CHECKING:
    from huoyan.api.sampling_params import SamplingParams
    from huoyan.media.types import PreparedPicture
    from huoyan.prompt.types import EncodedPrompt


@dataclass
class EngineRequest:
    request_id: str
    prompt: EncodedPrompt
    params: SamplingParams
    pictures: tuple[PreparedPicture, ...] = ()
    arrival_time: float = field(default_factory=monotonic)
    streamed: bool = True
    """Whether the output of every step is wanted; else only the last one is made."""
    in_bulk: bool = False
    """Whether it is one of a few that can all run at once, and all that counts is when the last of them is done: it may
    wait for others where that is sooner."""

    @property
    def num_picture_tokens(self) -> int:
        """Tokens of the prompt whose embeddings are pictures'."""
        return sum(slot.length * len(slot.offsets) for slot in self.prompt.slots)


def check_request(request: EngineRequest, vocab_size: int, query_num: int) -> None:
    """Raise InputError where token ids, pictures and their places do not fit the model or each other.

    `query_num`: embeddings of a slice.
    """
    prompt = request.prompt
    if prompt.token_ids and not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < vocab_size:
        bad = next(i for i in prompt.token_ids if not 0 <= i < vocab_size)
        raise InputError(f"token id {bad} in the prompt is outside the vocabulary of {vocab_size}")
    if len(prompt.slots) != len(request.pictures):
        raise InputError(
            f"the prompt has places for {len(prompt.slots)} pictures, but {len(request.pictures)} came"
        )
    for picture, slot in zip(request.pictures, prompt.slots, strict=True):
        if not 0 < picture.num_slices == len(slot.offsets) or slot.length != query_num:
            raise InputError(
                f"a picture of {picture.num_slices} slices of {query_num} embeddings does not fit its "
                f"place in the prompt ({len(slot.offsets)} runs of {slot.length} tokens)"
            )
        if any(not 0 <= o <= len(prompt.token_ids) - slot.length for o in slot.offsets):
            raise InputError("a picture's place lies outside of the prompt")


def check_room(request: EngineRequest, width: int, max_model_len: int, max_num_seqs: int) -> None:
    """Raise InputError where the prompt leaves no room for an answer, or wants too many (`width`) at once."""
    prompt_len = len(request.prompt.token_ids)
    if prompt_len == 0:
        raise InputError("the prompt is empty: it needs at least one token")
    if prompt_len >= max_model_len:
        raise InputError(
            f"the prompt has {prompt_len} tokens ({request.num_picture_tokens} of them pictures), but the "
            f"context is {max_model_len} and the answer needs one: shorten it, send fewer or "
            f"smaller pictures, or raise max_model_len"
        )
    if width > max_num_seqs:
        raise InputError(
            f"the request asks for {width} sequences at once, but max_num_seqs is "
            f"{max_num_seqs}: lower n, best_of or the beam width, or raise max_num_seqs"
        )
