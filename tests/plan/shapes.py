"""Random models, options and requests whose memory is large enough to be seen beside torch's own small change."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
import torch

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.config import EngineConfig
from huoyan.engine.request import EngineRequest
from huoyan.media.types import PreparedPicture, SlicePlan
from huoyan.models.config import ModelConfig, TextConfig, VisionConfig
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.weights import build_model, set_parameter
from tests.engine.support import request

CONTEXT = 512
FULL = ModelConfig(
    "2.6",
    TextConfig(3584, 18944, 28, 28, 4, 151666, 32768, 128),
    VisionConfig(1152, 4304, 27, 16, 980, 14),
    64,
)
"""The published model."""


def random_sizes(rng: random.Random) -> ModelConfig:
    """Wide and shallow, so that activations count; shapes as different as the rules allow."""
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 4])
    return ModelConfig(
        version="2.6",
        text=TextConfig(
            hidden_size=128 * rng.randint(1, 4),
            intermediate_size=rng.choice([200, 800, 2000]),
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=rng.choice([300, 5000, 20000]),
            max_position_embeddings=CONTEXT,
            head_dim=rng.choice([16, 32, 64]),
            tie_word_embeddings=rng.random() < 0.3,
        ),
        vision=VisionConfig(
            hidden_size=4 * rng.randint(16, 80),
            intermediate_size=rng.choice([100, 400, 1200]),
            num_hidden_layers=2,
            num_attention_heads=rng.choice([1, 2, 4]),
            image_size=140,
            patch_size=14,
            drop_last_layer=rng.random() < 0.2,
        ),
        query_num=rng.choice([10, 30]),
        dtype="float32",
    )


def random_model(rng: random.Random, dtype: torch.dtype = torch.float32) -> MiniCPMV:
    model = build_model(random_sizes(rng), seed=rng.randrange(2**31), dtype=dtype)
    if model.config.text.tie_word_embeddings:
        set_parameter(model, "llm.lm_head.weight", model.llm.model.embed_tokens.weight.detach())
    return model.eval().requires_grad_(False)


def random_options(rng: random.Random, **fixed: object) -> EngineConfig:
    tokens = rng.choice([64, 200, 512])
    sizes: dict[str, object] = {
        "block_size": rng.choice([4, 16]),
        "max_num_seqs": rng.choice([4, 16, 48]),
        "max_num_batched_tokens": tokens,
        "max_encoder_slices": rng.choice([2, 8, 16]),
        "max_slice_patches": rng.choice([64, 150, 400]),
        "picture_cache_bytes": rng.choice([0, 200_000, 2_000_000]),
        "num_blocks": 4000,
        **fixed,
    }
    return EngineConfig(**sizes)  # type: ignore[arg-type]


@dataclass
class Makes:
    """Makes requests for one model and one engine's options."""

    rng: random.Random
    sizes: ModelConfig
    options: EngineConfig

    def words(self, count: int) -> list[int]:
        return [self.rng.randrange(5, self.sizes.text.vocab_size) for _ in range(count)]

    def picture(self, num_slices: int, patches: int | None = None) -> PreparedPicture:
        noise = np.random.default_rng(self.rng.randrange(2**32))
        most = patches or self.options.max_slice_patches
        slices = []
        for _ in range(num_slices):
            rows = self.rng.randint(1, int(most**0.5)) if patches is None else int(most**0.5)
            columns = most // rows
            slices.append(noise.integers(0, 256, (14 * rows, 14 * columns, 3), np.uint8))
        digest = hashlib.sha256(b"".join(s.tobytes() for s in slices)).digest()
        return PreparedPicture(digest, SlicePlan((28, 28)), tuple(slices))

    def request(self, name: str, parts: list[object], **params: object) -> EngineRequest:
        params.setdefault("temperature", 0.0)
        params.setdefault("max_tokens", 3)
        made = request(name, [], SamplingParams(ignore_eos=True, **params))  # type: ignore[arg-type]
        ids: list[int] = []
        slots = []
        pictures = []
        from huoyan.prompt.types import EncodedPrompt, PictureSlot

        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            assert isinstance(part, PreparedPicture)
            offsets = []
            for _ in part.slices:
                ids.append(4)
                offsets.append(len(ids))
                ids.extend([3] * self.sizes.query_num)
            slots.append(PictureSlot(tuple(offsets), self.sizes.query_num))
            pictures.append(part)
        return EngineRequest(name, EncodedPrompt(ids, tuple(slots)), made.params, tuple(pictures))

    # -- kinds of load ------------------------------------------------------------------------------------

    def long_prompts(self) -> list[EngineRequest]:
        return [self.request(f"long{i}", [*self.words(CONTEXT - 8)]) for i in range(2)]

    def full_of_pictures(self) -> list[EngineRequest]:
        """The largest legal request: every token that can be one is a picture's."""
        each = self.sizes.query_num + 1
        room = (CONTEXT - 8) // each
        parts: list[object] = []
        while room:
            slices = min(room, self.rng.choice([1, 3, 10]))
            parts.append(self.picture(slices, self.options.max_slice_patches))
            room -= slices
        return [self.request("pictures", [*parts, *self.words(3)])]

    def many(self) -> list[EngineRequest]:
        """As many sequences as may run, sampled in every way at once."""
        kinds: list[dict[str, object]] = [
            {},
            {"temperature": 1.0},
            {"temperature": 0.7, "top_p": 0.9},
            {"temperature": 1.5, "top_k": 40, "min_p": 0.01},
            {"logprobs": 5, "repetition_penalty": 1.3},
            {"temperature": 1.0, "top_p": 0.999, "logit_bias": {7: -3.0}, "logprobs": 3},
        ]
        count = self.options.max_num_seqs + 3
        return [
            self.request(f"many{i}", [*self.words(self.rng.randint(1, 40))], **self.rng.choice(kinds))
            for i in range(count)
        ]

    def beams(self) -> list[EngineRequest]:
        width = min(self.options.max_num_seqs, 8)
        return [
            self.request(
                f"beams{i}", [*self.words(self.rng.randint(1, 200))],
                use_beam_search=True, best_of=width, n=width, max_tokens=6,
            )
            for i in range(4)
        ]  # fmt: skip

    def prompt_logprobs(self) -> list[EngineRequest]:
        return [self.request(f"p{i}", [*self.words(300)], prompt_logprobs=4, logprobs=2) for i in range(2)]


KINDS = ("long_prompts", "full_of_pictures", "many", "beams", "prompt_logprobs")
