"""What vLLM asks about a prompt's pictures: it gets our processor where it would load the checkpoint's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from vllm.model_executor.models.minicpmv import MiniCPMVMultiModalProcessor, MiniCPMVProcessingInfo

from huoyan.vllm_plugin.image_processor import MiniCPMVImageProcessor

OPTIONS = ("max_slice_nums", "use_image_id")
"""What `mm_processor_kwargs` may say, of the whole engine or of one prompt."""


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
        merged = self.ctx.get_merged_mm_kwargs(kwargs)
        given = tuple((name, merged[name]) for name in OPTIONS if merged.get(name) is not None)
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


@lru_cache(maxsize=32)
def _processor(
    model: str, revision: str | None, tokenizer: Any, given: tuple[tuple[str, Any], ...]
) -> MiniCPMVProcessor:
    image_processor = MiniCPMVImageProcessor.from_pretrained(model, revision=revision)
    for name, value in given:
        setattr(image_processor, name, value)
    return MiniCPMVProcessor(image_processor, tokenizer)
