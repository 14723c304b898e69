"""An engine takes no more than it was told, whatever it is asked; a machine too small says what would fit."""

from __future__ import annotations

import logging
import random
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from huoyan.engine.attention import attend_folded
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.sizing import beside_weights, tensor_bytes, way_of_model
from huoyan.errors import CapacityError, InputError
from huoyan.planning.sizes import MIB
from tests.cli.conftest import Command
from tests.plan.shapes import CONTEXT, Makes, random_model, random_options
from tests.plan.tracker import watched


def told(rng: random.Random, **fixed: object) -> EngineConfig:
    return replace(random_options(rng, **fixed), num_blocks=None)


def test_all_of_it_stays_inside_with_the_largest_requests(seed: int) -> None:
    """Weights, cache, and the fullest moment of a mix with a context full of pictures."""
    rng = random.Random(seed)
    model = random_model(rng)
    budget = tensor_bytes(model) + rng.randint(250, 400) * MIB
    options = told(rng, gpu_memory=budget, max_num_seqs=rng.choice([4, 16]))
    engine = Engine(model, options)
    makes = Makes(rng, model.config, options)
    requests = [
        *makes.full_of_pictures(),
        *makes.beams()[:1],
        *makes.many()[:6],
        *makes.prompt_logprobs()[:1],
    ]
    rng.shuffle(requests)

    def run() -> dict[str, object]:
        done = {}
        for request in requests:
            engine.add_request(request)
        while engine.has_unfinished_requests():
            done.update({output.request_id: output for output in engine.step() if output.finished})
        return done

    done, peaks = watched(engine, run)
    assert len(done) == len(requests)
    assert all(output.error is None for output in done.values())
    weights = sum(
        {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values()
    )
    assert weights + engine.size.total_bytes + peaks.total <= budget
    # And not by leaving it unused: what there is for sequences went to the cache.
    assert engine.size.max_model_len == CONTEXT


def test_memory_goes_to_the_cache(seed: int) -> None:
    """A budget's next megabytes are blocks."""
    rng = random.Random(seed)
    model = random_model(rng)
    options = told(rng, max_num_seqs=48, gpu_memory=1 << 50)
    useful = Engine(model, options).size.num_blocks
    assert useful == 48 * -(-CONTEXT // options.block_size), "more could never be used"
    base = tensor_bytes(model) + 300 * MIB
    sizes = [Engine(model, replace(options, gpu_memory=base + extra)).size for extra in (0, MIB)]
    if sizes[1].num_blocks < useful:
        gained = (sizes[1].num_blocks - sizes[0].num_blocks) * sizes[0].bytes_per_block
        assert MIB - sizes[0].bytes_per_block < gained < MIB + sizes[0].bytes_per_block


def test_a_shorter_context_is_said_in_one_line(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    blocks = CONTEXT // 16 // 2
    with caplog.at_level(logging.WARNING, logger="huoyan"):
        engine = Engine(model, EngineConfig(num_blocks=blocks, block_size=16))
    assert engine.size.max_model_len == CONTEXT // 2
    (record,) = caplog.records
    assert f"the context is {CONTEXT // 2} tokens, not the checkpoint's {CONTEXT}" in record.getMessage()
    assert "\n" not in record.getMessage()
    caplog.clear()
    Engine(model, EngineConfig(num_blocks=2 * blocks, block_size=16))
    Engine(model, EngineConfig(num_blocks=blocks, block_size=16, max_model_len=CONTEXT // 2))
    assert not caplog.records, "nothing was cut, or it was asked for"


def test_too_small_says_what_fits_and_that_is_true(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    options = told(rng, max_num_seqs=48, max_num_batched_tokens=512)
    size = Engine(model, replace(options, gpu_memory=1 << 50)).size
    beside, _ = beside_weights(options, model.config, way_of_model(model, options), size.limits)
    half = CONTEXT // options.block_size // 2
    less = tensor_bytes(model) + beside + size.bytes_per_block * half
    assert Engine(model, replace(options, gpu_memory=less)).size.num_blocks == half
    with pytest.raises(CapacityError) as refused:
        Engine(model, replace(options, gpu_memory=less, max_model_len=CONTEXT))
    message = str(refused.value)
    assert "\n" not in message
    assert "int4" in message or "max_num_seqs" in message or "max_model_len=" in message
    few = re.search(
        r"max_num_seqs=(\d+) and max_num_batched_tokens=(\d+) fit with max_model_len=(\d+)", message
    )
    if few:
        seqs, tokens, length = map(int, few.groups())
        smaller = replace(
            options, max_num_seqs=seqs, max_num_batched_tokens=tokens, picture_cache_bytes=0, gpu_memory=less,
            max_model_len=min(length, CONTEXT),
        )  # fmt: skip
        assert Engine(model, smaller).size.max_model_len == min(length, CONTEXT)


def test_cache_sizes_that_were_given_must_fit_as_well(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    budget = tensor_bytes(model) + 300 * MIB
    for given in ({"num_blocks": 10**6}, {"kv_cache_bytes": 1 << 40}):
        with pytest.raises(CapacityError, match="does not fit"):
            Engine(model, told(rng, gpu_memory=budget).__class__(gpu_memory=budget, **given))  # type: ignore[arg-type]


def test_pictures_beyond_the_plan_are_refused(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    options = random_options(rng, max_slice_patches=64, picture_cache_bytes=0)
    engine = Engine(model, options)
    makes = Makes(rng, model.config, options)
    with pytest.raises(InputError, match="a slice of a picture has 81 patches, and 64 have room"):
        engine.add_request(makes.request("a", [5, makes.picture(1, 81)]))
    with pytest.raises(InputError, match="65 slices, and 64 of one picture have room"):
        engine.add_request(makes.request("b", [5, makes.picture(65, 4)]))
    engine.add_request(makes.request("c", [5, makes.picture(1, 64), 6]))


def test_a_pass_of_the_encoder_holds_so_many_patches(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    options = random_options(rng, max_slice_patches=100, max_encoder_slices=7)
    engine = Engine(model, options)
    engine.runner.encoder._max_patches = 230
    makes = Makes(rng, model.config, options)
    slices = [makes.picture(1).slices[0] for _ in range(50)]
    passes = engine.runner.encoder.passes(slices)
    assert [i for first, last in passes for i in range(first, last)] == list(range(50))
    counts = [[s.shape[0] * s.shape[1] // 196 for s in slices[first:last]] for first, last in passes]
    assert all(len(part) <= 7 and sum(part) <= 230 for part in counts)
    for part, following in pairwise(counts):
        assert len(part) == 7 or sum(part) + following[0] > 230, "a pass that could have been larger"


def test_memory_that_runs_out_all_the_same_ends_the_step_s_requests_in_one_line(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    options = random_options(rng)
    engine = Engine(model, options)
    makes = Makes(rng, model.config, options)
    inner, failures = (
        engine.runner.forward,
        [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")],
    )

    def forward(*args: object) -> object:
        if failures:
            raise failures.pop()
        return inner(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.runner, "forward", forward)
    engine.add_request(makes.request("a", [*makes.words(5)]))
    (output,) = engine.step()
    assert output.error is not None
    assert output.error.startswith("the device ran out of memory")
    assert "\n" not in output.error
    engine.add_request(makes.request("b", [*makes.words(5)]))
    while engine.has_unfinished_requests():
        assert all(output.error is None for output in engine.step()), "the next ones go on"


def test_torch_is_told_where_to_stop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls, not their effect, which needs a card."""
    from huoyan.engine.sizing import limit_torch

    rng = random.Random(seed)
    total = rng.randint(8, 141) << 30
    said: list[float] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total // 2, total))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: said.append(part))
    limit_torch(total // 4, torch.device("cuda"))
    limit_torch(2 * total, torch.device("cuda"))
    limit_torch(None, torch.device("cuda"))
    limit_torch(1, torch.device("cpu"))
    assert said == [pytest.approx(0.25), 1.0, 1.0]


def test_segments_grow_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from huoyan.engine.segments import let_segments_grow

    said: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    let_segments_grow(torch.device("cpu"))
    assert not said
    let_segments_grow(torch.device("cuda"))
    assert said == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    let_segments_grow(torch.device("cuda"))
    assert len(said) == 1, "somebody has said otherwise"


def test_heads_that_share_a_key_head_can_stand_as_queries(seed: int) -> None:
    """What CUDA is given, so that it need not write scores out, is attention all the same."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    kv_heads, group, rows, past = rng.randint(1, 3), rng.randint(2, 4), rng.randint(1, 9), rng.randint(0, 20)
    q = torch.randn(1, kv_heads * group, rows, 8)
    k, v = torch.randn(2, 1, kv_heads, past + rows, 8)
    mask = torch.ones(rows, past + rows, dtype=torch.bool).tril_(past)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=mask
    )
    torch.testing.assert_close(attend_folded(q, k, v, mask), wanted)


def test_the_option_reaches_the_engine_and_is_checked(huoyan: Command, checkpoint: object) -> None:
    wrong = huoyan("ask", "--model", "tiny", "--gpu-memory", "much", "hello")
    assert wrong.code == 2
    assert wrong.err.strip().endswith("gpu_memory is 'much': give an amount such as 24GiB or 800MiB")
    small = huoyan("ask", "--model", "tiny", "--gpu-memory", "20MiB", "hello")
    assert small.code == 4
    (line,) = [line for line in small.err.splitlines() if line.startswith("huoyan:")]
    assert "the least it runs in is" in line
    from huoyan import LLM

    with LLM("tiny", gpu_memory="600MiB", max_num_seqs=4, max_model_len=2048) as llm:
        engine = llm._runtime.backend
        assert engine.config.gpu_memory == 600 * MIB
        assert engine.config.max_slice_patches == 8 * 16 * 16, (
            "from the checkpoint's slicing: 224 pixels of 14"
        )
        assert len(llm.ask(None, "hello", max_tokens=2)) >= 0
