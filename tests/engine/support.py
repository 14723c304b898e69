"""A tiny random model, requests, and the plain way to run one request alone."""

from __future__ import annotations

import hashlib
import math
import random

import numpy as np
import torch
from torch import Tensor

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.request import EngineRequest
from huoyan.media.types import PreparedPicture, SlicePlan
from huoyan.models.config import ModelConfig, TextConfig, VisionConfig
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.weights import build_model
from huoyan.prompt.types import EncodedPrompt, PictureSlot

VOCAB = 89
QUERIES = 5
PLACEHOLDER = 3


def tiny_model(seed: int, **text: object) -> MiniCPMV:
    """Two layers, grouped heads, and weights large enough that answers depend on all of the prompt."""
    sizes: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "head_dim": 16,
        **text,
    }
    config = ModelConfig(
        version="2.6",
        text=TextConfig(**sizes),  # type: ignore[arg-type]
        vision=VisionConfig(32, 48, 1, 2, 56, 14),
        query_num=QUERIES,
        dtype="float32",
    )
    model = build_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 2.0 / math.sqrt(parameter.shape[-1])
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise if parameter.dim() == 1 else noise)
    return model.eval()


def picture(rng: random.Random, num_slices: int = 1) -> PreparedPicture:
    """Noise in slices of 28 to 56 pixels."""
    noise = np.random.default_rng(rng.randrange(2**32))
    slices = tuple(
        noise.integers(0, 256, (14 * rng.randint(2, 4), 14 * rng.randint(2, 4), 3), np.uint8)
        for _ in range(num_slices)
    )
    digest = hashlib.sha256(b"".join(s.tobytes() for s in slices)).digest()
    return PreparedPicture(digest, SlicePlan((28, 28)), slices)


def request(
    request_id: str,
    prompt: list[int | PreparedPicture],
    params: SamplingParams | None = None,
    slices_apart: bool = True,
) -> EngineRequest:
    """A request whose prompt is given as token ids with the pictures where they stand."""
    ids: list[int] = []
    slots, pictures = [], []
    for part in prompt:
        if isinstance(part, int):
            ids.append(part)
            continue
        offsets = []
        for _ in part.slices:
            if slices_apart:
                ids.append(4)
            offsets.append(len(ids))
            ids.extend([PLACEHOLDER] * QUERIES)
        slots.append(PictureSlot(tuple(offsets), QUERIES))
        pictures.append(part)
    return EngineRequest(
        request_id,
        EncodedPrompt(ids, tuple(slots)),
        params or greedy(8),
        tuple(pictures),
    )


def greedy(max_tokens: int | None, **more: object) -> SamplingParams:
    more.setdefault("ignore_eos", True)
    # Several greedy answers would be the same, and are refused; the tests of forks choose for themselves.
    temperature = 0.0 if more.get("n", 1) == 1 or more.get("use_beam_search") else 1.0
    return SamplingParams(temperature=temperature, max_tokens=max_tokens, **more)  # type: ignore[arg-type]


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(5, VOCAB) for _ in range(count)]


class PlainAttention:
    """Causal attention of one whole sequence, written out; no cache, no blocks."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


@torch.inference_mode()
def plain_logits(
    model: MiniCPMV, req: EngineRequest, answer: list[int], attention: PlainAttention | None = None
) -> Tensor:
    """float32 [prompt + answer, vocab], everything computed at once."""
    ids = torch.tensor([*req.prompt.token_ids, *answer])
    x = model.embed(ids)
    for pic, slot in zip(req.pictures, req.prompt.slots, strict=True):
        for piece, offset in zip(pic.slices, slot.offsets, strict=True):
            x[offset : offset + slot.length] = model.encode_slices([piece])[0]
    return model.logits(model.decoder(x, torch.arange(len(ids)), attention or PlainAttention()))


def plain_greedy(
    model: MiniCPMV, req: EngineRequest, max_tokens: int, first: int | None = None
) -> tuple[list[int], float]:
    """The greedy answer, and the smallest distance between best and second best on the way.

    `first` is a first token to continue from, where the greedy one is not wanted.
    """
    answer: list[int] = []
    margin = math.inf
    stops = set(req.params.stop_token_ids or ())
    while len(answer) < max_tokens and not stops & set(answer):
        if first is not None and not answer:
            answer.append(first)
            continue
        logits = plain_logits(model, req, answer)[-1]
        if len(answer) + 1 < req.params.min_tokens:
            logits[list(stops)] = -math.inf
        best = logits.topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        answer.append(int(best.indices[0]))
    return answer, margin
