"""A view of the checkpoint's tokenizer with the method names of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huoyan.errors import InputError, ModelError

if TYPE_CHECKING:
    from huoyan.prompt.chat_template import ChatTemplate
    from huoyan.prompt.tokenizer import Tokenizer


class HFTokenizer:
    """What `LLM.get_tokenizer` gives: enough of a transformers tokenizer to write prompts and read ids."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> str | list[int]:
        """The conversation as the model reads it, as token ids or (`tokenize=False`) text.

        The contents are text; pictures are written as `(<image>./</image>)`. Unlike in `LLM.chat`, markers in
        the text count: use `chat` for text that comes from others.
        """
        template = self._chosen_template(chat_template)
        if continue_final_message and add_generation_prompt:
            raise InputError("continue_final_message and add_generation_prompt exclude each other")
        turns = [_turn(message) for message in conversation]
        text = template.render(turns, add_generation_prompt, **variables)
        if continue_final_message:
            last = str(turns[-1]["content"])
            text = text[: text.rindex(last.strip()) + len(last.strip())]
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        """Token ids; special tokens in the text stand for themselves."""
        ids = self._tokenizer.encode_with_specials(text)
        if not add_special_tokens:
            return ids
        return [*self._tokenizer.prefix_ids, *ids, *self._tokenizer.suffix_ids]

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True, **_: Any
    ) -> dict[str, Any]:
        """`{"input_ids", "attention_mask"}` of a text or of several."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        each = [self.encode(one, add_special_tokens) for one in text]
        return {"input_ids": each, "attention_mask": [[1] * len(ids) for ids in each]}

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of token ids (a list, an array, or one id)."""
        return self._tokenizer.decode(_ids(token_ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Sequence[Any], skip_special_tokens: bool = False, **_: Any
    ) -> list[str]:
        """The texts of several lists of token ids."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or of each of several; None (or the unknown token's id) for strangers."""
        if isinstance(tokens, str):
            found = self._tokenizer.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The token of an id, or of each of several, as the vocabulary writes it."""
        if isinstance(ids, int):
            return self._tokenizer.id_to_token(ids)
        return [self._tokenizer.id_to_token(one) for one in ids]

    @property
    def chat_template(self) -> str | None:
        """The template's Jinja source."""
        return None if self._template is None else self._template.source

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def __len__(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def all_special_tokens(self) -> list[str]:
        return list(self._tokenizer.special_tokens)

    @property
    def all_special_ids(self) -> list[int]:
        return list(self._tokenizer.special_tokens.values())

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    def bos_token_id(self) -> int | None:
        return self._tokenizer.bos_token_id

    @property
    def pad_token_id(self) -> int | None:
        return self._named("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._named("unk_token")

    eos_id = eos_token_id
    """The name the published tokenizers of MiniCPM-V give it."""
    bos_id = bos_token_id

    @property
    def eot_id(self) -> int | None:
        """The end of a turn, where the checkpoint has such a token (MiniCPM-V 2.5)."""
        return self._tokenizer.token_to_id("<|eot_id|>")

    @property
    def im_start(self) -> str:
        return "<image>"

    @property
    def im_end(self) -> str:
        return "</image>"

    def _named(self, name: str) -> int | None:
        content = self._tokenizer.named_special_tokens.get(name)
        return None if content is None else self._tokenizer.token_to_id(content)

    def _chosen_template(self, source: str | None) -> ChatTemplate:
        if source is not None:
            from huoyan.prompt.chat_template import ChatTemplate

            return ChatTemplate(source, self._tokenizer.named_special_tokens, "chat_template")
        if self._template is None:
            raise ModelError("the checkpoint has no chat template: give apply_chat_template(chat_template=…)")
        return self._template


def _turn(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise InputError("a conversation is a list of {'role', 'content'} dicts")
    if not isinstance(message["content"], str):
        raise InputError("apply_chat_template takes text contents: write pictures as (<image>./</image>)")
    return dict(message)


def _ids(token_ids: Any) -> list[int]:
    if hasattr(token_ids, "tolist"):
        token_ids = token_ids.tolist()
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)
