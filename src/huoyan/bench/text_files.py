"""The text side of a made-up checkpoint: a small tokenizer trained on the spot, and the published JSON files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huoyan.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>", "<ref>", "</ref>", "<box>",
    "</box>", "<quad>", "</quad>", "<point>", "</point>", "<slice>", "</slice>", "<image_id>",
    "</image_id>", "<unit>", "</unit>", "<unk>", "<s>", "</s>", "<|reserved_special_token_0|>",
)  # fmt: skip
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "MiniCPMVImageProcessor",
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "use_image_id": True,
    "image_feature_size": 64,
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "unk": "<unk>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
    "slice_mode": True,
    "norm_mean": [0.5, 0.5, 0.5],
    "norm_std": [0.5, 0.5, 0.5],
    "version": 2.6,
}
_LEARNED = 1500
_WORDS = (
    "the a picture of sky airplane what colour describe this video user system assistant image unk".split()
)
_CHINESE = "请描述这张图片飞机天空蓝色多少在哪里视频中国人说话你好"
_MARKS = (
    ")\n", ")\n\n", "(", " (", ")(", "\n(", "./", "<", ">", "</", "!(", "\n\n\n", "  ", "'s", "<|", "|>",
)  # fmt: skip


def train_tokenizer(
    vocab_size: int | None = None,
    *,
    seed: int = 0,
    split: str = QWEN2_SPLIT,
    special: Sequence[str] = SPECIAL_TOKENS,
) -> Tokenizer:
    """A byte-level BPE of two languages, built as Qwen2's is. It takes a fraction of a second.

    Args:
        vocab_size: ids in all, the special tokens last. What training does not fill are words that no text
            encodes to and any decoder can print. None: as many as are learned, without fillers.

    Raises:
        InputError: too few ids for all bytes and the special tokens.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    room = _LEARNED if vocab_size is None else vocab_size - len(special)
    if room < len(alphabet):
        raise InputError(
            f"a vocabulary of {vocab_size} is too small: bytes and special tokens are "
            f"{len(alphabet) + len(special)}"
        )

    def pipeline(model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    tokenizer = pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=min(_LEARNED, room), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    if vocab_size is not None:
        learned = json.loads(tokenizer.to_str())["model"]
        vocab = learned["vocab"]
        vocab.update({f"Ġ{i}#": i for i in range(len(vocab), room)})
        tokenizer = pipeline(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in learned["merges"]]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _corpus(seed: int) -> Iterator[str]:
    """Two languages, and the neighbourhoods of placeholders, so that merges cross their edges."""
    rng = random.Random(seed)
    for _ in range(1500):
        line = ""
        for _ in range(rng.randint(3, 15)):
            word = rng.choice(_WORDS)
            line += rng.choice([word, " " + word, rng.choice(_CHINESE) * 2, rng.choice(_MARKS)])
        yield line
    yield from ["<unk> <unk <image </image (<image>./</image>)\n(<video>./</video>)\n"] * 200


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`, chat template included."""
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHATML,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "model_max_length": 1000000000000000019884624838656,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): {flag: getattr(t, flag) for flag in flags} for i, t in added},
        "additional_special_tokens": [t.content for _, t in added if t.special],
    }


def write_text_files(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    text: dict[str, Any] | None = None,
    pictures: dict[str, Any] | None = None,
) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, `preprocessor_config.json`, `generation_config.json`.

    Args:
        text: fields of the tokenizer's config that differ; None takes one away.
        pictures: fields of the preprocessor's config that differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    of_text = {
        key: value for key, value in (tokenizer_config(tokenizer) | (text or {})).items() if value is not None
    }
    write_json(folder / "tokenizer_config.json", of_text)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR | (pictures or {}))
    end, padding = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    stops = [token for token in (end, padding) if token is not None]
    write_json(folder / "generation_config.json", {"eos_token_id": stops, "do_sample": False})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """One object, readable, in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
