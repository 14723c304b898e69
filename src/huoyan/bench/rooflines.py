"""The least time that a workload can take on a device, from the counts of `models/costs.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.models import costs
from huoyan.models.config import ModelConfig
from huoyan.models.costs import Cost, Speed, WeightFormat

if TYPE_CHECKING:
    from huoyan.models.minicpmv import MiniCPMV


@dataclass(frozen=True)
class Ask:
    """The size of one request: its slices' patches, its prompt's and its answer's tokens."""

    patches: tuple[int, ...]
    prompt: int
    answer: int


@dataclass(frozen=True)
class Rooflines:
    """Limits of one model on one device."""

    config: ModelConfig
    weights: WeightFormat
    kv_token: float
    """Bytes of a token's keys and values as the engine keeps them."""
    speed: Speed

    def first_token(self, asked: Ask) -> float:
        """Seconds to encode the pictures and compute the prompt: one after the other."""
        prompt = costs.prefill(self.config, asked.prompt, self.weights, kv_token=self.kv_token)
        return self._encode([asked]).seconds(self.speed) + prompt.seconds(self.speed)

    def step(self, contexts: Sequence[int], shared: int = 0) -> float:
        """Seconds of a decode step; arguments of `costs.decode_step`."""
        cost = costs.decode_step(self.config, contexts, self.weights, kv_token=self.kv_token, shared=shared)
        return cost.seconds(self.speed)

    def mean_step(self, asked: Ask, width: int = 1) -> float:
        """Seconds of a step of an answer, on average; `width` beams share the prompt."""
        return self.step([asked.prompt + 1 + asked.answer // 2] * width, asked.prompt)

    def all_of(self, asked: Sequence[Ask]) -> float:
        """Seconds for requests that run all at once, what reads hidden behind what computes and the other way."""
        total = self._encode(asked) + self._prompts(asked)
        for t in range(1, max((one.answer for one in asked), default=0)):
            contexts = [one.prompt + t for one in asked if t < one.answer]
            total += costs.decode_step(self.config, contexts, self.weights, kv_token=self.kv_token)
        return total.seconds(self.speed)

    def _encode(self, asked: Sequence[Ask]) -> Cost:
        return costs.encode(self.config, [n for one in asked for n in one.patches], self.weights)

    def _prompts(self, asked: Sequence[Ask]) -> Cost:
        """Computed together: the weights are read once."""
        text = self.config.text
        each = [costs.prefill(self.config, one.prompt, self.weights, kv_token=self.kv_token) for one in asked]
        again = costs.decoder_bytes(text, self.weights) + costs.head_bytes(text, self.weights)
        return sum(each, Cost(0, 0)) + Cost(-again * max(len(each) - 1, 0), 0)


def weight_format(model: MiniCPMV) -> WeightFormat:
    """How a loaded model's weights lie in memory."""
    from huoyan.layers.int4 import Int4Linear
    from huoyan.layers.int8 import Int8Linear

    names = {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down"}
    found: dict[str, int] = {}
    for name, module in model.llm.model.layers.named_modules():
        if isinstance(module, Int4Linear):
            found[names[name.rpartition(".")[2]]] = module.group_size
    group = min(found.values(), default=None)
    int8_head = isinstance(model.llm.lm_head, Int8Linear)
    return WeightFormat(model.dtype.itemsize, group, frozenset(found), int8_head)
