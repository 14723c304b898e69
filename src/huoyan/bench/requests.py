"""Requests to measure with: random words and pictures, new ones each time, so that no cache knows them."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from huoyan.api.ask import ask_messages
from huoyan.api.driver import Job
from huoyan.api.prompts import ChatPrompt, CompletionPrompt
from huoyan.api.sampling_params import SamplingParams
from huoyan.bench.rooflines import Ask
from huoyan.errors import InputError
from huoyan.media.picture import Picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from huoyan.api.runtime import Runtime
    from huoyan.media.types import Size, SlicePlan

QUESTION = "Describe this."
_BYTES = 256
"""The first ids of these tokenizers stand for single bytes; no special token is among them."""
_COARSE = 16
"""Noise of this many pixels a side compresses and resizes as pictures do, neither flat nor white noise."""


def params(tokens: int, beams: int = 1) -> SamplingParams:
    """Exactly `tokens` tokens; greedy, or a beam search."""
    search: dict[str, Any] = {"use_beam_search": True, "best_of": beams} if beams > 1 else {}
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **search)


class Requests:
    """Makes jobs. The same seed makes the same ones in the same order."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._ids = itertools.count()

    def words(self, tokens: int, sampling: SamplingParams) -> Job:
        """A prompt of so many tokens, without a picture."""
        ids = tuple(self._rng.integers(0, _BYTES, tokens).tolist())
        return self._job(CompletionPrompt(token_ids=ids), sampling)

    def pictures(self, sizes: list[Size], sampling: SamplingParams) -> Job:
        """A question about pictures of these sizes; without any, in words alone."""
        return self._job(ChatPrompt(ask_messages([self.picture(size) for size in sizes], QUESTION)), sampling)

    def frames(self, count: int, size: Size, sampling: SamplingParams) -> Job:
        """A question about a video whose frames are given. More than 16 are not cut into slices, as published."""
        frames = np.stack([self._noise(size) for _ in range(count)])
        slices = {"max_slice_nums": 1 if count > 16 else 2, "max_frames": count}
        parts = [{"type": "video", "video": frames}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": parts}]
        return self._job(ChatPrompt(messages, mm_processor_kwargs=slices), sampling)

    def picture(self, size: Size) -> Picture:
        return Picture(self._noise(size))

    def _noise(self, size: Size) -> NDArray[np.uint8]:
        from PIL import Image

        width, height = size
        coarse = (max(height // _COARSE, 1), max(width // _COARSE, 1), 3)
        noise = self._rng.integers(0, 256, coarse, dtype=np.uint8)
        return np.asarray(Image.fromarray(noise).resize(size))

    def _job(self, prompt: CompletionPrompt | ChatPrompt, sampling: SamplingParams) -> Job:
        return Job(f"bench-{next(self._ids)}", prompt, sampling)


def size_up(runtime: Runtime, job: Job, patch_size: int) -> Ask:
    """How large a job is, by preparing it as the engine would get it.

    Raises:
        InputError: it is wrong.
    """
    assert job.prompt is not None
    assert job.params is not None
    request = runtime.frontend.prepare(job.request_id, job.prompt, job.params)
    patches = [count for picture in request.pictures for count in slice_patches(picture.plan, patch_size)]
    return Ask(tuple(patches), len(request.prompt.token_ids), job.params.max_tokens or 0)


def slice_patches(plan: SlicePlan, patch_size: int) -> list[int]:
    """Patches of each slice of a picture."""
    sizes = [plan.overview]
    if plan.grid is not None and plan.cell is not None:
        sizes += [plan.cell] * (plan.grid[0] * plan.grid[1])
    return [(width // patch_size) * (height // patch_size) for width, height in sizes]


def parse_pictures(text: str) -> list[Size]:
    """`1344x896` or, for several of one request, `1344x896*4`; `none` is no picture.

    Raises:
        InputError: it is written otherwise.
    """
    if text == "none":
        return []
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})(?:\*([1-9]\d{0,2}))?", text)
    if match is None:
        raise InputError(f"{text!r} is no size of pictures: write 1344x896, 1344x896*4 for four, or none")
    width, height, count = match.groups()
    return [(int(width), int(height))] * int(count or 1)


def parse_numbers(text: str, what: str) -> list[int]:
    """`1,8,64`.

    Raises:
        InputError: it is written otherwise.
    """
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"{what} takes whole numbers above 0 with commas between them, not {text!r}")
    return [int(part) for part in parts]
