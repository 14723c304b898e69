"""From what a person passes in to what the engine takes: the media and the prompt stage of one request."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from huoyan.errors import InputError

if TYPE_CHECKING:
    from huoyan.api.media_items import MediaReader
    from huoyan.api.prompts import ChatPrompt, CompletionPrompt, Prompt
    from huoyan.api.sampling_params import SamplingParams
    from huoyan.engine.request import EngineRequest
    from huoyan.media.originals import Originals
    from huoyan.media.types import MediaItem
    from huoyan.prompt.generation_defaults import GenerationDefaults
    from huoyan.prompt.processor import PromptProcessor
    from huoyan.prompt.tokenizer import Tokenizer
    from huoyan.prompt.types import EncodedPrompt


class Frontend(Protocol):
    """Called from several threads at once."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def chat_template(self) -> Any: ...

    def prepare(self, request_id: str, prompt: Prompt, params: SamplingParams) -> EngineRequest:
        """Open, cut and encode. Raises InputError (MediaError) for what the request itself got wrong."""

    def default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json asks for, over vLLM's defaults."""

    def asked_sampling(self) -> dict[str, Any]:
        """Fields of `SamplingParams` for a plain question: greedy, unless the checkpoint samples."""


class CheckpointFrontend:
    """The stages before the engine, set up from a checkpoint's files."""

    def __init__(
        self,
        processor: PromptProcessor,
        reader: MediaReader,
        defaults: GenerationDefaults,
        choices: Any,
    ) -> None:
        """`choices`: `MediaChoices` of the whole model (`LLM(mm_processor_kwargs=…)`)."""
        self._processor = processor
        self._reader = reader
        self._defaults = defaults
        self._choices = choices
        self._with_template = lru_cache(maxsize=8)(self._replace_template)
        self._originals: Originals | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self._processor.tokenizer

    @property
    def chat_template(self) -> Any:
        return self._processor.template

    def keep_originals(self) -> None:
        """From now on the device resizes pictures, as far as the memory for those that wait goes."""
        from huoyan.media.originals import Originals

        self._originals = Originals()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The checkpoint's: any of them ends an answer."""
        return self._defaults.stop_token_ids

    def default_sampling_params(self) -> SamplingParams:
        from huoyan.api.sampling_params import SamplingParams

        return SamplingParams.from_dict({}, self._defaults.sampling)

    def asked_sampling(self) -> dict[str, Any]:
        if self._defaults.do_sample:
            return {**self._defaults.sampling}
        return {"temperature": 0.0}

    def prepare(self, request_id: str, prompt: Prompt, params: SamplingParams) -> EngineRequest:
        from time import monotonic

        from huoyan.api.prompts import ChatPrompt
        from huoyan.engine.request import EngineRequest
        from huoyan.media.prepare import prepare_items

        arrival = monotonic()
        items, encoded = self._chat(prompt) if isinstance(prompt, ChatPrompt) else self._completion(prompt)
        pictures = prepare_items(items, self._processor.rules, self._originals)
        return EngineRequest(request_id, encoded, params, tuple(pictures), arrival)

    def _completion(self, prompt: CompletionPrompt) -> tuple[list[MediaItem], EncodedPrompt]:
        items = self._reader.items(prompt.multi_modal_data, self._choose(prompt))
        if prompt.token_ids is not None:
            return items, self._processor.from_token_ids(prompt.token_ids, items)
        assert prompt.text is not None
        if not prompt.text:
            raise InputError("the prompt is empty: give text, or messages to chat")
        return items, self._processor.from_text(prompt.text, items)

    def _chat(self, prompt: ChatPrompt) -> tuple[list[MediaItem], EncodedPrompt]:
        from huoyan.prompt.messages import MediaPart, parse_messages

        choices = self._choose(prompt)
        messages = parse_messages(prompt.messages, lambda parts: self._reader.load_each(parts, choices))
        items = [part.item for m in messages for part in m.parts if isinstance(part, MediaPart)]
        self._reader.check_counts(items)
        processor = self._processor
        if prompt.chat_template is not None:
            processor = self._with_template(prompt.chat_template)
        encoded = processor.from_messages(
            messages,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            template_variables=prompt.chat_template_kwargs,
        )
        return items, encoded

    def _choose(self, prompt: Prompt) -> Any:
        from huoyan.api.media_items import MediaChoices

        return MediaChoices.parse(prompt.mm_processor_kwargs, "mm_processor_kwargs").over(self._choices)

    def _replace_template(self, source: str) -> PromptProcessor:
        from huoyan.prompt.chat_template import ChatTemplate

        processor = copy.copy(self._processor)
        processor.template = ChatTemplate(source, self.tokenizer.named_special_tokens, "chat_template")
        return processor


def open_frontend(folder: Any, tokenizer_folder: Any, options: Any) -> CheckpointFrontend:
    """Read the checkpoint's tokenizer, template, slice rules and generation defaults.

    Raises:
        ModelError: one of its files is missing or unusable.
    """
    from huoyan.api.media_items import MediaChoices, MediaReader
    from huoyan.media.fetch import FetchPolicy
    from huoyan.media.limits import MediaLimits
    from huoyan.prompt.generation_defaults import GenerationDefaults
    from huoyan.prompt.processor import PromptProcessor

    processor = PromptProcessor.from_folder(folder, tokenizer_folder=tokenizer_folder)
    reader = MediaReader(
        options.fetch_policy or FetchPolicy(allowed_folder=options.allowed_local_media_path),
        MediaLimits(options.max_pixels),
        options.limit_mm_per_prompt,
    )
    defaults = GenerationDefaults.from_folder(folder, processor.tokenizer, processor.version)
    return CheckpointFrontend(
        processor, reader, defaults, MediaChoices.parse(options.mm_processor_kwargs, "mm_processor_kwargs")
    )
