"""The tokenizer of MiniCPM-V 2.6: `tokenizer.json` as it is, and the names of the tokens around pictures."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

# What vLLM gives to transformers' AutoTokenizer, which this class stands for.
_OF_AUTO_TOKENIZER = ("config", "mistral_format", "tokenizer_type", "use_fast")


class MiniCPMVTokenizerFast(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Attributes as vLLM and code written for the published class know them: `im_start`, `im_start_id`, …"""

    im_start = "<image>"
    im_end = "</image>"
    ref_start = "<ref>"
    ref_end = "</ref>"
    box_start = "<box>"
    box_end = "</box>"
    quad_start = "<quad>"
    quad_end = "</quad>"
    slice_start = "<slice>"
    slice_end = "</slice>"
    im_id_start = "<image_id>"
    im_id_end = "</image_id>"

    @property
    def eos_id(self) -> int:
        return self._id(self.eos_token)

    @property
    def bos_id(self) -> int:
        return self._id(self.bos_token)

    @property
    def unk_id(self) -> int:
        return self._id(self.unk_token)

    @property
    def im_start_id(self) -> int:
        return self._id(self.im_start)

    @property
    def im_end_id(self) -> int:
        return self._id(self.im_end)

    @property
    def slice_start_id(self) -> int:
        return self._id(self.slice_start)

    @property
    def slice_end_id(self) -> int:
        return self._id(self.slice_end)

    @property
    def im_id_start_id(self) -> int:
        return self._id(self.im_id_start)

    @property
    def im_id_end_id(self) -> int:
        return self._id(self.im_id_end)

    @property
    def newline_id(self) -> int:
        return self._id("\u010a")

    def _id(self, token: str) -> int:
        return int(self.convert_tokens_to_ids(token))


def load_tokenizer(name: Any, *args: Any, **kwargs: Any) -> MiniCPMVTokenizerFast:
    """Read the tokenizer of the folder or hub name, with the arguments of `AutoTokenizer.from_pretrained`."""
    kept = {key: value for key, value in kwargs.items() if key not in _OF_AUTO_TOKENIZER}
    tokenizer: MiniCPMVTokenizerFast = MiniCPMVTokenizerFast.from_pretrained(name, *args, **kept)
    return tokenizer
