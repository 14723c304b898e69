"""A request as the engine takes it: token ids, prepared pictures, parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

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
