"""From a prompt and its pictures to the token ids and picture slots that the engine takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from huoyan.errors import InputError, ModelError
from huoyan.media.slicing import plan_slices, read_slice_rules
from huoyan.media.types import MediaItem, SlicePlan, SliceRules
from huoyan.models.config import read_json
from huoyan.prompt.builder import PictureCoder, PromptBuilder
from huoyan.prompt.chat_template import ChatTemplate
from huoyan.prompt.forgery import Hidden, MarkerFinder, Sentinels
from huoyan.prompt.messages import MediaPart, Message
from huoyan.prompt.picture_writer import PictureWriter
from huoyan.prompt.placeholders import PLACEHOLDERS, Tags, layout_for
from huoyan.prompt.tokenizer import Tokenizer
from huoyan.prompt.types import EncodedPrompt
from huoyan.prompt.written_ids import FoundPlaceholder, checked_ids, split_at_placeholders

_PLACEHOLDERS = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
_KIND_OF = {placeholder: kind for kind, placeholder in PLACEHOLDERS.items()}


@dataclass(frozen=True)
class _Forged:
    """A stretch of a user's text that only looks special."""

    text: str


@dataclass(frozen=True)
class _Here:
    """A picture's or video's place: which item of the request it is."""

    index: int


@dataclass(frozen=True)
class _Cut:
    """Where the last message ends, when it is to be continued."""


_Sentinels: TypeAlias = "Sentinels[_Forged | _Here | _Cut]"
_Hidden: TypeAlias = "Hidden[_Forged | _Here | _Cut]"


class PromptProcessor:
    """Encodes prompts for one checkpoint. Safe to share between threads.

    In each result, `slots` has one entry a picture, in the order of the items and of the pictures in them.
    The i-th image placeholder of a prompt stands for the i-th item of kind "image", and likewise for videos.
    Images are numbered from 0 in the order of the prompt; frames of a video have no number.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        rules: SliceRules,
        version: str = "2.6",
        tags: Tags | None = None,
    ) -> None:
        """Raises ModelError where the tokenizer lacks a tag of the version's pictures."""
        self.tokenizer = tokenizer
        self.template = template
        self.rules = rules
        self.version = version
        layout = layout_for(version, tags or Tags())
        self._coder = PictureCoder(tokenizer, layout, rules.image_feature_size)
        self._tags = frozenset(layout.needed_tags)
        prefix = map(tokenizer.id_to_token, tokenizer.prefix_ids)
        self._prefix = "".join(token for token in prefix if token is not None)
        self._markers = MarkerFinder({*tokenizer.special_tokens, *layout.needed_tags, *_KIND_OF})

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        rules: SliceRules | None = None,
        tokenizer_folder: str | Path | None = None,
    ) -> PromptProcessor:
        """Read a checkpoint's tokenizer, chat template, tags, version and (unless given) slice rules.

        The first two come from `tokenizer_folder` where it is given. Raises ModelError naming the file.
        """
        folder = Path(folder)
        rules = rules or read_slice_rules(folder)
        tokenizer_folder = tokenizer_folder or folder
        tokenizer = Tokenizer.from_folder(tokenizer_folder)
        template = ChatTemplate.from_folder(tokenizer_folder, tokenizer.named_special_tokens)
        version = str(read_json(folder / "config.json").get("version", "2.0"))
        return cls(tokenizer, template, rules, version, Tags.from_folder(folder))

    def from_text(self, prompt: str, items: Sequence[MediaItem] = ()) -> EncodedPrompt:
        """Encode a prompt that went through the chat template already, as vLLM's users write it.

        `(<image>./</image>)` and `(<video>./</video>)` stand for the items; ChatML markers are special, as
        they are the writer's own; a picture's inner tags such as `<unk>` are plain text. Raises InputError.
        """
        if not isinstance(prompt, str):
            raise InputError(f"the prompt must be a text, not a {type(prompt).__name__}")
        writer = PictureWriter(self._coder, items, self)
        writer.check([_KIND_OF[match.group()] for match in _PLACEHOLDERS.finditer(prompt)])
        if not (self._prefix and prompt.startswith(self._prefix)):
            writer.builder.add_ids(self.tokenizer.prefix_ids)
        start = 0
        for match in _PLACEHOLDERS.finditer(prompt):
            self._add_marked_text(writer.builder, prompt[start : match.start()])
            writer.add_next(_KIND_OF[match.group()])
            start = match.end()
        self._add_marked_text(writer.builder, prompt[start:])
        writer.builder.add_ids(self.tokenizer.suffix_ids)
        return writer.finish(prompt)

    def from_messages(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> EncodedPrompt:
        """Encode a conversation with the checkpoint's chat template; only the template makes special tokens.

        Parts stand on lines of their own. With `continue_final_message` (and `add_generation_prompt=False`)
        the last message stays open, for the model to go on writing it. Slots follow the conversation.
        Raises InputError, ModelError where the checkpoint has no usable chat template.
        """
        if self.template is None:
            raise ModelError(
                "the checkpoint has no chat template: use generate() with a whole prompt instead of messages"
            )
        if not messages:
            raise InputError("messages is empty: at least one message is needed")
        if add_generation_prompt and continue_final_message:
            raise InputError(
                "add_generation_prompt and continue_final_message exclude each other: "
                "set add_generation_prompt=False to continue the last message"
            )
        texts = [part.text for m in messages for part in m.parts if not isinstance(part, MediaPart)]
        sentinels: _Sentinels = Sentinels(texts)
        items = [part.item for m in messages for part in m.parts if isinstance(part, MediaPart)]
        places = (sentinels.stand_in(_Here(i)) for i in range(len(items)))
        turns = [self._turn(message, sentinels, places) for message in messages]
        if continue_final_message:
            # The space tells whether the template trims: then the text before the cut is to be trimmed too.
            turns[-1]["content"] += sentinels.stand_in(_Cut()) + " "
        variables = self._hide_in(template_variables or {}, sentinels)
        rendered = self.template.render(turns, add_generation_prompt, **variables)
        pieces = sentinels.split(rendered)
        if continue_final_message:
            pieces = _up_to_cut(pieces)
        return self._encode_pieces(pieces, items)

    def from_token_ids(self, token_ids: Sequence[int], items: Sequence[MediaItem] = ()) -> EncodedPrompt:
        """Take ids as they are; nothing is added around them.

        Pictures stand in them as their encoded placeholders, which are replaced, or written out in full
        already, in the order of the items. Raises InputError where the two do not agree.
        """
        ids = checked_ids(token_ids)
        writer = PictureWriter(self._coder, items, self)
        if self._coder.has_written(ids):
            grids = [self.plan(picture, item).grid for item in items for picture in item.pictures]
            return EncodedPrompt(ids, self._coder.find_written(ids, grids))
        pieces = split_at_placeholders(
            ids, self.tokenizer, with_videos=any(item.kind == "video" for item in items)
        )
        writer.check([piece.kind for piece in pieces if isinstance(piece, FoundPlaceholder)])
        for piece in pieces:
            if isinstance(piece, FoundPlaceholder):
                writer.add_next(piece.kind)
            else:
                writer.builder.add_ids(piece)
        return writer.finish(None)

    def plan(self, picture: Any, item: MediaItem) -> SlicePlan:
        """How a picture of an item is cut: its own plan where it is prepared already."""
        plan = getattr(picture, "plan", None)
        if isinstance(plan, SlicePlan):
            return plan
        return plan_slices(picture.size, self.rules, item.max_slice_nums)

    def is_numbered(self, item: MediaItem) -> bool:
        """Whether the item's pictures show their number in the prompt."""
        if item.use_image_id is not None:
            return item.use_image_id
        return item.kind == "image" and self.rules.use_image_id

    def _add_marked_text(self, builder: PromptBuilder, text: str) -> None:
        for piece in self.tokenizer.split_at_specials(text, self._tags):
            if isinstance(piece, int):
                builder.add_ids([piece])
            else:
                builder.add_text(piece)

    def _turn(self, message: Message, sentinels: _Sentinels, places: Iterator[str]) -> dict[str, str]:
        parts = [
            next(places) if isinstance(part, MediaPart) else self._hide(part.text, sentinels)
            for part in message.parts
        ]
        return {"role": message.role, "content": "\n".join(parts)}

    def _hide(self, text: str, sentinels: _Sentinels, edges: bool = True) -> str:
        spans = self._markers.spans(text, edges)
        if not spans:
            return text
        out: list[str] = []
        start = 0
        for begin, end in spans:
            out += [text[start:begin], sentinels.stand_in(_Forged(text[begin:end]))]
            start = end
        return "".join([*out, text[start:]])

    def _hide_in(self, value: Any, sentinels: _Sentinels) -> Any:
        if isinstance(value, str):
            # Only whole markers: templates compare their variables with words.
            return self._hide(value, sentinels, edges=False)
        if isinstance(value, Mapping):
            return {key: self._hide_in(inner, sentinels) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide_in(inner, sentinels) for inner in value]
        return value

    def _encode_pieces(self, pieces: Sequence[str | _Hidden], items: Sequence[MediaItem]) -> EncodedPrompt:
        writer = PictureWriter(self._coder, items, self)
        found = [p.value.index for p in pieces if isinstance(p, Hidden) and isinstance(p.value, _Here)]
        if found != list(range(len(items))):
            raise ModelError(
                "the chat template leaves out, repeats or moves pictures; this one cannot be used with them"
            )
        text: list[str] = []
        for piece in pieces:
            if isinstance(piece, str):
                text.append(piece)
                for part in self.tokenizer.split_at_specials(piece):
                    if isinstance(part, int):
                        writer.builder.add_ids([part])
                    else:
                        writer.builder.add_text(part)
            elif isinstance(piece.value, _Forged):
                text.append(piece.value.text)
                writer.builder.add_text(piece.value.text)
            elif isinstance(piece.value, _Here):
                item = items[piece.value.index]
                text.append(PLACEHOLDERS[item.kind])
                # The model's own chat() gives each frame a line, vLLM's placeholder for a video does not.
                writer.add_next(item.kind, between="\n")
        return writer.finish("".join(text))


def _up_to_cut(pieces: list[str | _Hidden]) -> list[str | _Hidden]:
    cuts = [i for i, p in enumerate(pieces) if isinstance(p, Hidden) and isinstance(p.value, _Cut)]
    if not cuts:
        raise InputError("the chat template leaves out the last message, so it cannot be continued")
    kept, after = pieces[: cuts[-1]], pieces[cuts[-1] + 1 :]
    trims = not (after and isinstance(after[0], str) and after[0].startswith(" "))
    if trims and kept and isinstance(kept[-1], str):
        kept[-1] = kept[-1].rstrip()
    return kept
