"""Known graphics cards: what a plan needs of their data sheets.

Memory is what the card is sold with (drivers keep some hundred MiB of it: `--gpu auto` asks the card). Then come
the bandwidth of its memory, and dense 16-bit tensor throughput with float32 accumulation: half of what is quoted "with
sparsity", and on GeForce cards, whose float32 accumulation runs at half rate, half of that. Sources, all NVIDIA's own:

* RTX 30 series: "NVIDIA Ampere GA102 GPU Architecture" white paper 2.1, appendix A (RTX 3060 and 3060 Ti: product
  pages, with throughput from cores and boost clock by the same rule).
* RTX 40 series: "NVIDIA Ada GPU Architecture" white paper 2.1, appendix A; the smaller cards from their product pages
  by the same rule.
* RTX 50 series: "NVIDIA RTX Blackwell GPU Architecture" white paper, appendix A.
* T4, A10, L4, L40S, A100, H100, H200: the data sheet of each (SXM where there are two forms).
* RTX A6000, RTX 6000 Ada: their data sheets.

A T4 has no bfloat16; its number is float16's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from huoyan.errors import InputError
from huoyan.planning.sizes import GIB, parse_bytes


@dataclass(frozen=True)
class Card:
    """`memory` in bytes; `bandwidth` in bytes a second, `flops` in operations a second, 0 where unknown."""

    name: str
    memory: int
    bandwidth: float = 0.0
    flops: float = 0.0


def _card(name: str, memory_gib: int, gigabytes: float, teraflops: float) -> Card:
    return Card(name, memory_gib * GIB, gigabytes * 1e9, teraflops * 1e12)


CARDS = (
    _card("RTX 3060", 12, 360, 25.5),
    _card("RTX 3070", 8, 448, 40.6),
    _card("RTX 3080", 10, 760, 59.5),
    _card("RTX 3090", 24, 936, 71),
    _card("RTX 4060 Ti", 16, 288, 44.1),
    _card("RTX 4070", 12, 504, 58.3),
    _card("RTX 4080", 16, 717, 97.5),
    _card("RTX 4090", 24, 1008, 165.2),
    _card("RTX 5070 Ti", 16, 896, 87.9),
    _card("RTX 5080", 16, 960, 112.6),
    _card("RTX 5090", 32, 1792, 209.5),
    _card("RTX A6000", 48, 768, 154.8),
    _card("RTX 6000 Ada", 48, 960, 364.2),
    _card("T4", 16, 320, 65),
    _card("A10", 24, 600, 125),
    _card("L4", 24, 300, 121),
    _card("L40S", 48, 864, 362),
    _card("A100 40GB", 40, 1555, 312),
    _card("A100 80GB", 80, 2039, 312),
    _card("H100", 80, 3350, 989),
    _card("H200", 140, 4800, 989),
)  # fmt: skip
_VARIANTS = re.compile(r"(?<=[^a-z])(?:ti|super|laptop|mobile|max-q)(?![a-z])")
"""Words that make another card of a name."""
_AMOUNT = re.compile(r"\s*\d+(\.\d+)?\s*[kmgt]?i?b?\s*", re.IGNORECASE)


def find_card(text: str) -> Card:
    """The card that `text` names ("RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090"), or one of that much memory.

    Raises:
        InputError: neither.
    """
    if _AMOUNT.fullmatch(text):
        return Card(text.strip(), parse_bytes(text, "--gpu"))
    name = text.lower()
    other = set(_VARIANTS.findall(name))
    found = [
        c for c in CARDS if _pattern(c.name).search(name) and set(_VARIANTS.findall(c.name.lower())) == other
    ]
    if not found:
        names = ", ".join(card.name for card in CARDS)
        raise InputError(f"no card {text!r} is known: give its memory (24GiB), auto, or one of {names}")
    return max(found, key=lambda card: len(card.name))


def _pattern(name: str) -> re.Pattern[str]:
    """The words of a card's name one after the other, as words; a device's own name may have others between."""
    words = r"(?:[^a-z0-9]*|.*[^a-z0-9])".join(name.lower().split())
    return re.compile(rf"(?<![a-z0-9]){words}(?![a-z0-9])")


def this_card() -> Card:
    """The CUDA device of this machine, its speed where its name is known.

    Raises:
        InputError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "--gpu auto finds no CUDA device here: give a card's name or its memory, such as 24GiB"
        )
    properties = torch.cuda.get_device_properties(0)
    memory = int(torch.cuda.mem_get_info(0)[1])
    try:
        known = find_card(properties.name)
    except InputError:
        return Card(properties.name, memory)
    return Card(properties.name, memory, known.bandwidth, known.flops)
