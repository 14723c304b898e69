"""Prepared pictures as vLLM's multimodal inputs: our slices, our placeholders, vLLM's caches.

vLLM's own processor of pictures is not used. Each picture (a frame of a video too) is one item of kind "image",
made of the uint8 slices that the native engine encodes; where its embeddings go is told token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from huoyan.models.published_patches import published_patches

if TYPE_CHECKING:
    import torch

    from huoyan.engine.request import EngineRequest
    from huoyan.media.types import PreparedPicture, SliceRules
    from huoyan.prompt.types import PictureSlot


class PictureInputs:
    """Makes the items of requests. What vLLM's engine process has already is not made or sent again."""

    def __init__(self, rules: SliceRules, dtype: torch.dtype, cache: Any) -> None:
        """`dtype`: the model's. `cache`: vLLM's record of what its engine process keeps, or None."""
        self._rules = rules
        self._dtype = dtype
        self._cache = cache
        self._places: tuple[Sequence[PictureSlot], list[Any]] = ((), [])
        """Of the request that was asked for last: it is checked, then sent, and each beam asks again."""

    def prompt(self, request: EngineRequest, token_ids: list[int], *, send: bool) -> dict[str, Any]:
        """vLLM's rendered prompt for `token_ids`, which begin with the request's own.

        `send` False gives one to be checked only: without pixels, and no cache is told of them.
        """
        if not request.pictures:
            return {"type": "token", "prompt_token_ids": token_ids}
        keys = [picture.key.hex() for picture in request.pictures]
        items = [
            self._cached(picture, key) if send else None
            for picture, key in zip(request.pictures, keys, strict=True)
        ]
        return {
            "type": "multimodal",
            "prompt_token_ids": token_ids,
            "mm_kwargs": {"image": items},
            "mm_hashes": {"image": keys},
            "mm_placeholders": {"image": self._placeholders(request.prompt.slots)},
        }

    def _placeholders(self, slots: Sequence[PictureSlot]) -> list[Any]:
        known, places = self._places
        if known is not slots:
            places = [placeholder(slot) for slot in slots]
            self._places = slots, places
        return list(places)

    def _cached(self, picture: PreparedPicture, key: str) -> Any:
        cache = self._cache
        if cache is None:
            return self.item(picture)
        new: Any = None if cache.is_cached_item(key) else (self.item(picture), [])
        return cache.get_and_update_item(new, key)[0]

    def item(self, picture: PreparedPicture) -> Any:
        """One picture as vLLM's model reads it: for each slice [3, side, patches * side], and the grids."""
        import torch
        from vllm.model_executor.models.minicpmv import _minicpmv_field_config
        from vllm.multimodal.inputs import MultiModalKwargsItems

        pixels, grids = published_patches(picture.slices, self._rules, self._dtype)
        width, height = picture.plan.overview
        inputs: Any = {
            "pixel_values": [pixels],
            "image_sizes": [torch.tensor([[width, height]])],
            "tgt_sizes": [torch.tensor(grids)],
        }
        return MultiModalKwargsItems.from_hf_inputs(inputs, _minicpmv_field_config(inputs))["image"][0]


def placeholder(slot: PictureSlot) -> Any:
    """Where a picture's embeddings go: from its first slice's first token to its last slice's last one."""
    import torch
    from vllm.multimodal.inputs import PlaceholderRange

    start, end = slot.offsets[0], slot.offsets[-1] + slot.length
    mask = torch.zeros(end - start, dtype=torch.bool)
    for offset in slot.offsets:
        mask[offset - start : offset - start + slot.length] = True
    return PlaceholderRange(offset=start, length=end - start, is_embed=mask)
