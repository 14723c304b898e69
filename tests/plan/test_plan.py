"""`huoyan.plan` and its command: what is said, and that it is what the parts come to."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import huoyan as package
from huoyan.errors import InputError, ModelError
from huoyan.media.types import SliceRules
from huoyan.planning.cards import CARDS, find_card
from huoyan.planning.plan import Plan
from huoyan.planning.request_shape import request_shape
from huoyan.planning.roofline import BATCHES
from huoyan.planning.sizes import GIB
from tests.cli.conftest import Command


def test_parts_add_up_to_the_card(seed: int) -> None:
    rng = random.Random(seed)
    # What goes beside the cache, CUDA's own part above all, takes 1134 MiB.
    budget = rng.randint(1200, 1600) << 20
    found = package.plan("tiny", budget, max_num_seqs=256)
    assert isinstance(found, Plan)
    assert [variant.name for variant in found.variants] == ["bfloat16", "int4"]
    assert [variant.predicted for variant in found.variants] == [False, True]
    for variant in found.variants:
        whole = sum(dataclasses.asdict(variant.parts).values())
        block = 16 * variant.kv[0].bytes_per_token
        assert budget - block < whole <= budget
        assert variant.kv[0].tokens * variant.kv[0].bytes_per_token == variant.parts.kv_cache
        for option in variant.kv:
            per_request = -(-found.request.length // 16) * 16
            assert option.largest_batch == min(option.tokens // per_request, 256)
            assert option.longest_context == min(option.tokens, found.context)
    dense, int4 = found.variants
    assert int4.parts.weights < dense.parts.weights
    assert int4.kv[0].tokens > dense.kv[0].tokens


def test_int4_as_it_is_and_16_bits_predicted() -> None:
    int4, dense = package.plan("tiny-int4", "1GiB").variants
    assert (int4.name, int4.predicted, dense.predicted) == ("int4", False, True)
    other = package.plan("tiny", "1GiB").variants
    assert dense.parts.weights == other[0].parts.weights
    # Its groups are finer than those of a prediction.
    assert 0.9 < other[1].parts.weights / int4.parts.weights <= 1


def test_sizes_by_name_are_planned_as_a_checkpoint_of_them(tmp_path: Path) -> None:
    from huoyan.bench.random_checkpoint import write_random_checkpoint

    folder = write_random_checkpoint(tmp_path / "dense", "small")
    by_name, read = package.plan("small", "1GiB"), package.plan(folder, "1GiB")
    assert by_name.model == "small"
    assert by_name.variants == read.variants
    assert (by_name.context, by_name.request) == (read.context, read.request)
    folder = write_random_checkpoint(tmp_path / "int4", "small", quantization="awq", dtype="float16")
    by_name, read = package.plan("small-int4", "1GiB"), package.plan(folder, "1GiB")
    assert by_name.variants == read.variants
    (tmp_path / "minicpm-v-2_6").mkdir()
    with pytest.raises(ModelError):
        package.plan(tmp_path / "minicpm-v-2_6", "1GiB")


def test_tokens_of_a_request_are_the_processor_s(seed: int) -> None:
    """Of random pictures, by the stages that the engine's prompts go through."""
    import numpy as np

    from huoyan import LLM, Picture
    from huoyan.api.prompts import ChatPrompt

    rng = random.Random(seed)
    with LLM("tiny", max_num_seqs=2) as llm:

        def tokens(parts: list[dict[str, Any]]) -> int:
            prompt = ChatPrompt([{"role": "user", "content": parts}])
            request = llm._runtime.frontend.prepare("a", prompt, package.SamplingParams())
            return len(request.prompt.token_ids)

        for _ in range(2):
            size = (rng.randint(30, 600), rng.randint(30, 600))
            count = rng.randint(1, 2)
            pictures = [Picture(np.zeros((size[1], size[0], 3), np.uint8)) for _ in range(count)]
            parts = [{"type": "image", "image": p} for p in pictures] + [
                {"type": "text", "text": "what is it?"}
            ]
            words = tokens(parts)
            request = package.plan("tiny", "1GiB", images=count, resolution=size, max_tokens=1).request
            assert abs(request.prompt_tokens - words) <= 48, "the words are a guess, the pictures are not"
            # Pictures stand on lines of their own: a line's end each more.
            of_pictures = words - tokens(parts[-1:])
            assert abs(request.prompt_tokens - 48 - of_pictures) <= count


def test_rooflines_are_what_a_hand_computes() -> None:
    """The published model on an RTX 4090, one sequence: 15.14 GB of decoder and head at 1008 GB/s."""
    from huoyan.engine.config import EngineConfig
    from huoyan.planning.memory import memory
    from huoyan.planning.roofline import limit, step_seconds
    from huoyan.planning.shapes import published_shapes
    from huoyan.planning.workspace import Way
    from tests.plan.shapes import FULL

    card = find_card("RTX 4090")
    dense = memory(FULL, EngineConfig(), Way(2, True), published_shapes(FULL))
    read = 2 * (7_612_756_480 - 151_666 * 3584)
    assert abs(dense.weights.read_by_decode - read) < 0.001 * read
    seconds = (dense.weights.read_by_decode + 1000 * 57344) / 1.008e12
    assert step_seconds(FULL, dense, card, 1, 1000) == pytest.approx(seconds)
    found = limit(FULL, dense, card, 1000, fit=8)
    assert found.decode[1] == pytest.approx(1 / seconds)
    assert found.decode[8] == pytest.approx(8 * 1.008e12 / (dense.weights.read_by_decode + 8000 * 57344))
    assert found.decode[64] is None, "64 do not fit"
    # Many sequences are bound by arithmetic.
    busy = step_seconds(FULL, dense, card, 10_000, 1)
    assert busy == pytest.approx(10_000 * 2 * 7.07e9 / 165.2e12, rel=0.01)
    assert found.prefill == pytest.approx(165.2e12 / (2 * 6.525e9), rel=0.01)


def test_cards_by_name_by_size_and_by_what_a_device_calls_itself() -> None:
    assert find_card("rtx4090").name == find_card("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert find_card("NVIDIA A100-SXM4-80GB").name == "A100 80GB"
    assert find_card("NVIDIA H100 80GB HBM3").name == "H100"
    assert find_card("L4").name == "L4"
    assert find_card("NVIDIA L40S").name == "L40S"
    assert find_card("Tesla T4").name == "T4"
    assert find_card("NVIDIA GeForce RTX 4060 Ti").name == find_card("rtx4060ti").name == "RTX 4060 Ti"
    assert find_card("NVIDIA RTX 6000 Ada Generation").name == "RTX 6000 Ada"
    assert find_card("24GiB").memory == 24 * GIB
    assert find_card("24GiB").bandwidth == 0
    for wrong in (
        "RTX",
        "GTX 1080",
        "",
        "many",
        "NVIDIA A10G",
        "RTX 3060 Ti",
        "GeForce RTX 4080 SUPER",
        "A100",
    ):
        with pytest.raises(InputError, match="RTX 4090"):
            find_card(wrong)
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert 1e11 < card.bandwidth < 1e13
        assert 1e13 < card.flops < 1e15
        assert 8 <= card.memory / GIB <= 141


def test_requests_that_cannot_be() -> None:
    for wrong in (
        {"images": -1},
        {"max_tokens": 0},
        {"resolution": "large"},
        {"gpu": "GTX"},
        {"kv_cache_dtype": "x"},
    ):
        with pytest.raises(InputError):
            package.plan("tiny", **{"gpu": "1GiB", **wrong})  # type: ignore[arg-type]
    assert request_shape(SliceRules(), 64, 0, (1, 1), 5).slices == 0


def test_the_command_prints_plain_text_into_a_pipe(huoyan: Command) -> None:
    done = huoyan(
        "plan", "tiny", "--gpu", "RTX 4090", "--images", 2, "--resolution", "640x480", "--max-tokens", 99
    )
    assert done.code == 0
    assert done.err == ""
    assert done.out.isascii()
    lines = done.out.splitlines()
    assert lines[0] == "tiny on RTX 4090 (24.0 GiB)"
    for label in (
        "decoder",
        "KV cache",
        "workspace of a step",
        "CUDA context (estimate)",
        "  largest batch",
        "H200",
    ):
        assert any(line.startswith(label) for line in lines), label
    assert "2 of 640x480" in done.out
    assert "99 out" in done.out
    assert "Limits, not measurements" in done.out
    assert max(map(len, lines)) <= 110
    none = huoyan("plan", "tiny", "--gpu", "100MiB")
    assert none.code == 0
    assert "bfloat16 does not fit: without a KV cache it takes " in none.out
    wrong = huoyan("plan", "tiny", "--gpu", "GTX")
    assert wrong.code == 2
    assert len(wrong.err.splitlines()) == 1


def test_json_is_the_plan(huoyan: Command) -> None:
    done = huoyan("plan", "tiny", "--gpu", "1GiB", "--kv-cache-dtype", "int8", "--max-num-seqs", 7, "--json")
    value = json.loads(done.out)
    found = package.plan("tiny", "1GiB", kv_cache_dtype="int8", max_num_seqs=7)
    assert value == json.loads(json.dumps(found.as_dict()))
    assert value["variants"][0]["kv"][0]["kv_cache_dtype"] == "int8"
    assert value["variants"][0]["limits"][0]["decode"].keys() == {str(batch) for batch in BATCHES}


def test_a_picture_of_the_plan(huoyan: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import numpy as np
    from PIL import Image

    target = tmp_path / "plan.png"
    done = huoyan("plan", "tiny", "--gpu", "1.5GiB", "--plot", target)
    assert done.code == 0
    assert done.err.strip() == f"huoyan: wrote {target}"
    pixels = np.asarray(Image.open(target).convert("RGB")).reshape(-1, 3)
    # Half of each bar is the KV cache in its colour.
    share = (abs(pixels.astype(int) - (0xED, 0xAE, 0x49)).max(1) < 8).mean()
    assert 0.02 < share < 0.5
    bad = huoyan("plan", "tiny", "--gpu", "1GiB", "--plot", tmp_path / "none" / "plan.png")
    assert bad.code == 2
    assert "cannot write" in bad.err


def test_without_matplotlib_it_says_what_to_install(
    huoyan: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huoyan.planning.plot as plot

    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    done = huoyan("plan", "tiny", "--gpu", "1GiB", "--plot", tmp_path / "plan.png")
    assert done.code == 2
    assert done.err.strip() == "huoyan: --plot needs matplotlib: pip install 'huoyan[plot]'"


def test_a_plan_needs_no_torch() -> None:
    import subprocess

    code = "import sys, huoyan; huoyan.plan('tiny', '1GiB'); assert 'torch' not in sys.modules"
    source = str(Path(package.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": source, "PATH": ""})
