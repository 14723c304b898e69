"""The sums of `huoyan.planning` against what torch's allocator really had in runs of the engine."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.engine import Engine
from huoyan.engine.sampler import SamplingRow, sample
from huoyan.engine.sizing import tensor_bytes, way_of_model
from huoyan.engine.token_counts import TokenCounts
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.weights import build_model, quantize_randomly
from huoyan.planning import workspace as ws
from huoyan.planning.memory import picture_bytes
from huoyan.planning.weights import table_bytes
from huoyan.planning.workspace import workspace
from tests.plan.shapes import KINDS, Makes, random_model, random_options, random_sizes
from tests.plan.tracker import MOMENTS, peak_of, watched


def a_model(rng: random.Random) -> MiniCPMV:
    """Of float32 or bfloat16, in int4 or not."""
    model = random_model(rng, rng.choice([torch.float32, torch.bfloat16]))
    text = model.config.text
    if (
        rng.random() < 0.4
        and text.intermediate_size % 32 == 0 == text.head_dim * text.num_attention_heads % 32
    ):
        quantize_randomly(model, 32, rng.randrange(100))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_no_moment_takes_more_than_was_said(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    model = a_model(rng)
    options = random_options(rng)
    engine = Engine(model, options)
    said = workspace(model.config, way_of_model(model, options), engine.size.limits)
    requests = getattr(Makes(rng, model.config, options), kind)()

    def run() -> None:
        for request in requests:
            engine.add_request(request)
        while engine.has_unfinished_requests():
            errors = [output.error for output in engine.step() if output.error is not None]
            assert not errors

    _, peaks = watched(engine, run)
    pictures = picture_bytes(model.config, options, way_of_model(model, options))
    for moment in MOMENTS:
        # Pictures stay when they are encoded, gathering buffers when they are first needed.
        stays = {"encoder": pictures, "decoder": said.kept + tables(model)}.get(moment, 0)
        assert peaks.moments[moment] <= getattr(said, moment) + stays, moment
    assert peaks.total <= said.total + pictures + tables(model)
    assert peaks.total > 0


def tables(model: MiniCPMV) -> int:
    """Made when first used, and counted with the weights."""
    return table_bytes(model.config, model.dtype.itemsize)


def wide_model(rng: random.Random) -> MiniCPMV:
    """Whose activations are large beside what a step takes whatever the model is."""
    sizes = random_sizes(rng)
    text = dataclasses.replace(
        sizes.text, hidden_size=512, intermediate_size=rng.randint(1000, 3000), vocab_size=rng.randint(5000, 20000),
        tie_word_embeddings=False,
    )  # fmt: skip
    vision = dataclasses.replace(
        sizes.vision, hidden_size=4 * rng.randint(60, 120), intermediate_size=rng.randint(100, 1500)
    )
    dtype = rng.choice([torch.float32, torch.bfloat16])
    model = build_model(dataclasses.replace(sizes, text=text, vision=vision), dtype=dtype)
    return model.eval().requires_grad_(False)


def test_a_full_prefill_is_said_closely(seed: int) -> None:
    """The largest moment of a step where prompts are long."""
    rng = random.Random(seed)
    model = wide_model(rng)
    # One chunk for the whole prompt: later ones would gather, which is counted apart.
    options = random_options(rng, max_num_batched_tokens=512, max_num_seqs=1)
    engine = Engine(model, options)
    makes = Makes(rng, model.config, options)
    engine.add_request(makes.request("a", [*makes.words(511)], max_tokens=1, prompt_logprobs=1))
    _, peaks = watched(engine, engine.step)
    said = workspace(model.config, way_of_model(model, options), engine.size.limits)
    for moment in ("decoder", "prompt_logprobs"):
        took = peaks.moments[moment]
        assert took <= getattr(said, moment) <= 1.25 * took + (1 << 20), moment


def test_a_full_pass_of_the_encoder_is_said_closely(seed: int) -> None:
    rng = random.Random(seed)
    model = wide_model(rng)
    makes = Makes(rng, model.config, random_options(rng, max_slice_patches=144))
    slices = [makes.picture(1, 144).slices[0] for _ in range(rng.randint(12, 24))]
    way = ws.Way(model.dtype.itemsize, cuda=False, threads=torch.get_num_threads())
    with torch.inference_mode():
        model.encode_slices(slices[:1])
        took = peak_of(lambda: model.encode_slices(slices))
    patches = sum((s.shape[0] // 14) * (s.shape[1] // 14) for s in slices)
    said = ws.encoder(model.config, way, patches, len(slices))
    assert took <= said <= 1.6 * took


@pytest.mark.parametrize("same", [True, False])
def test_choosing_takes_no_more_than_was_said(same: bool, seed: int) -> None:
    """All rows by the way that takes the most (sorted, with penalties and grammars), or each by another."""
    rng = random.Random(seed)
    vocab, count = 8000, 24
    logits = torch.randn(count, vocab) * 0.01
    allowed = torch.rand(vocab) < 0.9
    kinds: list[dict[str, object]] = [
        {"repetition_penalty": 1.2, "temperature": 1.0, "top_p": 0.99, "logprobs": 5},
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.5, "top_k": 50},
        {"logit_bias": {3: 1.0}, "logprobs": 2},
    ]
    rows = []
    for i in range(count):
        params = SamplingParams(**(kinds[0] if same else rng.choice(kinds)))  # type: ignore[arg-type]
        counts = TokenCounts(list(range(99))) if params.has_penalties else None
        grammar = allowed if rng.random() < 0.5 else None
        rows.append(SamplingRow(params, 3, counts=counts, allowed=grammar, key=i))
    took = peak_of(lambda: sample(logits, rows))
    said = (ws.CHOICE_BYTES + ws.SORT_BYTES) * vocab * count
    assert took <= said
    if same:
        assert took > said / 2


def test_weights_and_cache_are_said_to_the_byte(seed: int) -> None:
    from huoyan.models.weights import published_state
    from huoyan.planning.shapes import published_shapes
    from huoyan.planning.weights import weights

    rng = random.Random(seed)
    for _ in range(3):
        model = random_model(rng)
        state = {name: tuple(value.shape) for name, value in published_state(model).items()}
        assert published_shapes(model.config) == state
        said = weights(model.config, state, 4)
        assert said.total == tensor_bytes(model)
        options = random_options(rng)
        engine = Engine(model, options)
        cache = engine.runner.cache
        assert engine.size.total_bytes == sum(
            t.untyped_storage().nbytes() for t in _tensors(cache.keys) + _tensors(cache.values)
        )


def _tensors(stored: object) -> list[torch.Tensor]:
    return [stored] if isinstance(stored, torch.Tensor) else list(stored.tensors)  # type: ignore[attr-defined]


def test_int4_is_predicted_from_the_shapes_of_a_dense_checkpoint(seed: int) -> None:
    from huoyan.planning.shapes import published_shapes
    from huoyan.planning.weights import weights

    rng = random.Random(seed)
    sizes = random_sizes(rng)
    text = dataclasses.replace(
        sizes.text,
        intermediate_size=128 * rng.randint(1, 6),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
    )
    sizes = dataclasses.replace(sizes, text=text)
    model = build_model(sizes, dtype=torch.bfloat16).eval().requires_grad_(False)
    dense = weights(sizes, published_shapes(sizes), 2)
    assert not dense.int4
    predicted = weights(sizes, published_shapes(sizes), 2, int4=True)
    quantize_randomly(model, 128, 1)
    assert predicted.total == tensor_bytes(model)
    assert predicted.layers < dense.layers / 3
    # And back: what an int4 checkpoint is in 16 bits.
    packed = {}
    for name, shape in published_shapes(sizes).items():
        if name.endswith("_proj.weight") and name.startswith("llm.model.layers."):
            matrix, (rows, columns) = name.removesuffix(".weight"), shape
            packed[f"{matrix}.qweight"] = (columns, rows // 8)
            packed[f"{matrix}.qzeros"] = (columns // 128, rows // 8)
            packed[f"{matrix}.scales"] = (columns // 128, rows)
        else:
            packed[name] = shape
    as_it_is = weights(sizes, packed, 2)
    assert as_it_is.int4
    assert as_it_is.total == predicted.total
    assert weights(sizes, packed, 2, int4=False) == dense
