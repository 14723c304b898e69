"""What vLLM asks about a prompt's pictures: it gets our processor where it would load the checkpoint's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from vllm.model_executor.models.minicpmv import MiniCPMVMultiModalProcessor, MiniCPMVProcessingInfo

from huoyan.errors import InputError
from huoyan.vllm_plugin.image_processor import MiniCPMVImageProcessor


class MiniCPMVProcessor(ProcessorMixin):  # type: ignore[misc]
    """The image processor and the tokenizer. vLLM encodes the text itself and wants the pictures only."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **_: Any) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(
        self, text: Any = None, images: Any = None, max_slice_nums: int | None = None, **_: Any
    ) -> BatchFeature:
        """`images`: for each prompt a list of pictures. See `MiniCPMVImageProcessor.preprocess`."""
        return self.image_processor.preprocess(images or [], max_slice_nums=max_slice_nums)


class HuoyanProcessingInfo(MiniCPMVProcessingInfo):  # type: ignore[misc]
    """vLLM's, with our processor."""

    def get_hf_processor(self, **kwargs: object) -> MiniCPMVProcessor:
        given = _options(self.ctx.get_merged_mm_kwargs(kwargs))
        model = self.ctx.model_config
        return _processor(model.model, model.revision, self.get_tokenizer(), given)


class HuoyanMultiModalProcessor(MiniCPMVMultiModalProcessor):  # type: ignore[misc]
    """vLLM's, which forgets the options of a prompt when it writes its placeholders.

    There `max_slice_nums` of one prompt changes the slices and not their placeholders, and the engine dies of the
    difference.
    """

    _options: Mapping[str, object] = {}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        # What is returned writes the text later and keeps this object: the copy knows the prompt's options.
        bound = copy.copy(self)
        bound._options = hf_processor_mm_kwargs
        return super(HuoyanMultiModalProcessor, bound)._get_prompt_updates(
            mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        )

    def get_image_prompt_texts(self, image_size: Any, image_idx: int = 0) -> str:
        image_processor = self.info.get_hf_processor(**self._options).image_processor
        text: str = image_processor.get_slice_image_placeholder(image_size, image_idx)
        return text


def _options(merged: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What `mm_processor_kwargs` says of pictures, for the whole engine or for one prompt."""
    slices, numbered = merged.get("max_slice_nums"), merged.get("use_image_id")
    if slices is not None and (isinstance(slices, bool) or not isinstance(slices, int) or slices < 1):
        raise InputError(f"max_slice_nums must be a whole number of at least 1, not {slices!r}")
    if numbered is not None and not isinstance(numbered, bool):
        raise InputError(f"use_image_id must be true or false, not {numbered!r}")
    options = {"max_slice_nums": slices, "use_image_id": numbered}
    return tuple((name, value) for name, value in options.items() if value is not None)


@lru_cache(maxsize=32)
def _processor(
    model: str, revision: str | None, tokenizer: Any, given: tuple[tuple[str, Any], ...]
) -> MiniCPMVProcessor:
    image_processor = MiniCPMVImageProcessor.from_pretrained(model, revision=revision)
    for name, value in given:
        setattr(image_processor, name, value)
    return MiniCPMVProcessor(image_processor, tokenizer)
