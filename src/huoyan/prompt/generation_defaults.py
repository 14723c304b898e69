"""When to stop and how to sample, where the request does not say: from the checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huoyan.errors import ModelError
from huoyan.prompt.files import read_json_if_there

if TYPE_CHECKING:
    from huoyan.prompt.tokenizer import Tokenizer

_CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")
# 2.0 stops at its eos alone, 2.5 (Llama 3) at its end of turn too; later ones speak ChatML.
_STOP_TOKENS = {"2.0": (), "2.5": ("<|eot_id|>",)}
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True)
class GenerationDefaults:
    stop_token_ids: tuple[int, ...]
    """Any of these ends an answer; in rising order."""
    do_sample: bool | None = None
    """What the checkpoint prefers; None where it does not say."""
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    """Fields of `SamplingParams` (their names there) that generation_config.json sets."""

    @classmethod
    def from_folder(cls, folder: str | Path, tokenizer: Tokenizer, version: str) -> GenerationDefaults:
        """Read generation_config.json, config.json and the tokenizer's eos. Raises ModelError.

        An absent generation_config.json is no error; a checkpoint that names no stop token at all is.
        """
        folder = Path(folder)
        path = folder / "generation_config.json"
        generation = read_json_if_there(path)
        ids = _ids(generation.get("eos_token_id"), path)
        if not ids:
            config = folder / "config.json"
            ids = _ids(read_json_if_there(config).get("eos_token_id"), config)
        named = {tokenizer.token_to_id(t) for t in _STOP_TOKENS.get(version, _CHATML_STOPS)}
        stops = {*ids, tokenizer.eos_token_id, *named} - {None}
        if not stops:
            raise ModelError(f"{folder}: no file names an eos token, so no answer would ever end")
        sampling = {
            ours: _number(generation[theirs], theirs, path)
            for theirs, ours in _SAMPLING.items()
            if generation.get(theirs) is not None
        }
        do_sample = generation.get("do_sample")
        return cls(
            stop_token_ids=tuple(sorted(i for i in stops if i is not None)),
            do_sample=None if do_sample is None else bool(do_sample),
            sampling=sampling,
        )


def _ids(value: Any, path: Path) -> list[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in values):
        raise ModelError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
    return values


def _number(value: Any, name: str, path: Path) -> float | int:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"{path}: {name} must be a number, not {value!r}")
    return value
