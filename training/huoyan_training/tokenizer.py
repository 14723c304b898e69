"""The byte-level BPE of `tiny`, trained on the questions and answers, in the published folder's files.

Run `python -m huoyan_training.tokenizer FOLDER`.

Printed words are spelled letter by letter, so that reading is copying: capitals,
digits and small letters never
merge, except small letters after a space. A printed word stands in quotes and never follows a space,
so it is always
single characters, while " airplane" in a sentence may be one token.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter, defaultdict
from math import sqrt
from pathlib import Path

import numpy as np

from .chat import TALKS
from .example import COLOURS, KINDS
from .families import sample_any
from .language import BACKDROPS, COLOUR_ZH, DIRECTIONS, DOINGS, NOUNS, ORDINALS, PLACES, RELATIONS
from .painter import texts_only

VOCABULARY = 1024
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>", "<ref>", "</ref>", "<box>",
    "</box>", "<quad>",
    "</quad>", "<point>", "</point>", "<slice>", "</slice>", "<image_id>", "</image_id>", "<unit>",
    "</unit>", "<unk>",
)  # fmt: skip
# Chinese characters join only inside these words: how a word is cut then depends on nothing around it.
WORDS_ZH = (
    *(n.zh for n in NOUNS.values()), *COLOUR_ZH.values(), *(zh for _, zh in PLACES.values()),
    *(zh for _, zh in RELATIONS.values()), *(zh for *_, zh, _ in BACKDROPS.values()), *(zh for _,
    zh in DOINGS.values()),
    *(zh for _, zh in DIRECTIONS.values()), *(zh for _, zh in ORDINALS),
    *["图中", "图里", "图片", "这张", "张图片", "张图", "视频", "什么", "颜色", "东西", "没有", "还有",
    "有没有",
    "是不是",
    "哪里",
    "哪儿",
    "哪张", "哪边", "多少", "几个", "请问", "描述", "背景", "写着", "上面", "牌子", "文字", "数字", "单词",
    "衣服",
    "移动",
    "变成",
    "移到",
    "变化", "不同", "一样", "是的", "不是", "更多", "更少", "位置", "方向", "地方", "数一数", "一共", "内容",
    "你看到",
    "小东西",
    "模型",
    "演示"],
)  # fmt: skip
# The pre-tokenizer of Qwen2, which MiniCPM-V 2.6 uses: digits stand alone.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What people may type around the trained sentences; merges only.
GENERIC = (
    "the a an is are was were this that these those it they you we he she of in on at to for from with "
    "and or not no yes can could do does did have has please what which who where when why how many "
    "much there here one two image images picture pictures photo video word text number color colour "
    "small large big thing things left right top bottom up down system user assistant helpful "
)


def _corpus(n_examples: int, seed: int) -> Counter[str]:
    rng = np.random.default_rng(seed)
    texts: Counter[str] = Counter()
    with texts_only():
        for _ in range(n_examples):
            _, example = sample_any(rng, "train")
            for question, answer in example.turns:
                texts[question] += 1
                texts[answer] += 2
    for answers, zh, en in TALKS:
        for text in (*answers, *zh, *en):
            texts[text] += 20
    for word in (*GENERIC.split(), *KINDS, *COLOURS):
        texts[f" {word}"] += 20
    texts["system\nYou are a helpful assistant.\nuser\nassistant\n"] += 50
    return texts


def _whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _may_merge(a: bytes, b: bytes) -> bool:
    """Bytes of a character, characters of a listed word, a space with small letters, punctuation."""
    if a[0] >= 0x80 and b[0] >= 0x80:
        if _whole(a) or _whole(b):
            return _whole(a) and _whole(b) and any((a + b).decode() in word for word in WORDS_ZH)
        return len(a + b) <= 4
    if a[0] >= 0x80 or b[0] >= 0x80:
        return False
    if a[:1] == b" " and len(b) == 1 and b.isalpha() and b.islower():
        return a == b" " or a[1:].islower()
    return all(not chr(c).isalnum() and c != 0x0A for c in a + b) and not b.startswith(b" ")


Word = tuple[bytes, ...]
Pair = tuple[bytes, bytes]


def _learn(words: dict[Word, float], n: int) -> list[Pair]:
    """`n` merges of byte-level BPE over weighted words, by falling weight among the pairs that may merge."""
    spelled, weights = [list(word) for word in words], list(words.values())
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(spelled):
        for pair in itertools.pairwise(word):
            pairs[pair] += weights[index]  # type: ignore[assignment]
            places[pair].add(index)
    possible: dict[Pair, bool] = {}
    merges: list[Pair] = []
    while len(merges) < n:
        for pair in pairs.keys() - possible.keys():
            possible[pair] = _may_merge(*pair)
        live = [pair for pair, allowed in possible.items() if allowed and pairs[pair] > 1e-9]
        if not live:
            break
        best = max(live, key=lambda pair: (round(pairs[pair], 6), pair))
        merges.append(best)
        for index in sorted(places.pop(best)):
            word = spelled[index]
            for pair in itertools.pairwise(word):
                pairs[pair] -= weights[index]  # type: ignore[assignment]
            spelled[index] = word = _merged(word, best)
            for pair in itertools.pairwise(word):
                pairs[pair] += weights[index]  # type: ignore[assignment]
                places[pair].add(index)
    return merges


def _merged(word: list[bytes], pair: Pair) -> list[bytes]:
    parts: list[bytes] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            parts.append(word[i] + word[i + 1])
            i += 2
        else:
            parts.append(word[i])
            i += 1
    return parts


def _byte_names() -> list[str]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names, extra = {}, 0
    for value in range(256):
        if value in printable:
            names[value] = chr(value)
        else:
            names[value] = chr(256 + extra)
            extra += 1
    return [names[value] for value in range(256)]


def train_tokenizer(folder: str | Path, n_examples: int = 6000, seed: int = 20240806) -> None:
    """Writes the tokenizer's files and generation_config.json into `folder`.

    Exactly VOCABULARY tokens, the special ones last; ValueError where the corpus is too small for that.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    words: Counter[str] = Counter()
    for text, count in _corpus(n_examples, seed).items():
        for word, _ in split.pre_tokenize_str(text):
            words[word] += count
    # Rare phrasings matter too: the square root keeps frequent words from taking every merge.
    spelled = {tuple(bytes([c]) for c in word.encode()): sqrt(count) for word, count in words.items()}
    merges = _learn(spelled, VOCABULARY - 256 - len(SPECIALS))
    names = _byte_names()

    def named(data: bytes) -> str:
        return "".join(names[c] for c in data)

    tokens = [named(bytes([c])) for c in range(256)] + [named(a + b) for a, b in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    if len(vocabulary) != VOCABULARY - len(SPECIALS):
        raise ValueError(
            f"the corpus gives {len(vocabulary)} tokens, not {VOCABULARY - len(SPECIALS)}: use more examples"
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(named(a), named(b)) for a, b in merges]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    _write(Path(folder), tokenizer)


def _write(folder: Path, tokenizer: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(tokenizer.to_str())  # type: ignore[attr-defined]
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    model = state["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    ids = {name: index for index, name in enumerate(SPECIALS, VOCABULARY - len(SPECIALS))}
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}

    def dump(name: str, value: object) -> None:
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    dump("added_tokens.json", ids)
    dump(
        "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(index): {"content": name, **entry} for name, index in ids.items()},
            "additional_special_tokens": [s for s in SPECIALS if s not in ("<|endoftext|>", "<unk>")],
            "bos_token": "<|im_start|>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 4096,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2TokenizerFast",
            "unk_token": "<unk>",
        },
    )
    dump(
        "special_tokens_map.json",
        {
            "additional_special_tokens": [s for s in SPECIALS if s not in ("<|endoftext|>", "<unk>")],
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<unk>",
        },
    )
    dump(
        "generation_config.json",
        {
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 100,
            "repetition_penalty": 1.05,
        },
    )


if __name__ == "__main__":
    train_tokenizer(sys.argv[1])
