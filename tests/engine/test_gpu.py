"""The engine on a GPU: kernels, packed prefill and graphs give what the plain model gives in float32."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from huoyan.api.outputs import RequestOutput
from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.beam_ops import BeamOps
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.picture_encoder import PictureEncoder
from huoyan.engine.prompt_lookup import Speculator
from huoyan.engine.request import EngineRequest
from huoyan.engine.sequence import Sequence
from huoyan.engine.speculation import NgramSpeculation
from huoyan.layers.beam_step import FACTS, HEAD, SearchOrders, advance
from huoyan.media.originals import Originals
from huoyan.media.picture import Picture
from huoyan.media.prepare import prepare_picture
from huoyan.media.types import PreparedPicture, SliceRules
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.harness import drive
from tests.engine.support import VOCAB, greedy, picture, plain_logits, request, tiny_model, words
from tests.engine.test_kv_cache import ThroughEightBits
from tests.sampling.beam_cases import random_orders

pytestmark = pytest.mark.gpu
# Run by `make test-gpu`.
NOISE = {torch.float16: 0.03, torch.bfloat16: 0.2}


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return tiny_model(31)


def engine_on_gpu(model: MiniCPMV, dtype: torch.dtype, **config: object) -> Engine:
    sizes = {"num_blocks": 60, "block_size": 16, "max_num_seqs": 12, "max_num_batched_tokens": 40, **config}
    return Engine(copy.deepcopy(model).to("cuda", dtype), EngineConfig(**sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_tokens_and_logprobs_are_the_plain_model_s(
    model: MiniCPMV, seed: int, dtype: torch.dtype, enforce_eager: bool
) -> None:
    rng = random.Random(seed)
    pictures = [picture(rng, rng.randint(1, 4)) for _ in range(3)]
    requests = []
    for i in range(20):
        parts = words(rng, rng.randint(1, 60))
        for _ in range(rng.choice([0, 1, 2])):
            parts = [*parts, rng.choice(pictures), *words(rng, 3)]
        requests.append(request(f"r{i}", parts, greedy(rng.choice([1, 5, 20]))))
    outputs = drive(engine_on_gpu(model, dtype, enforce_eager=enforce_eager), requests, rng)
    check_answers(model, requests, outputs, dtype)


def check_answers(
    model: MiniCPMV, requests: list[EngineRequest], outputs: dict[str, RequestOutput], dtype: torch.dtype
) -> None:
    """Every chosen token is the float32 model's likeliest, within what 16 bits change of the plain model's logits."""
    rounded = copy.deepcopy(model).to(dtype)
    behind: list[torch.Tensor] = []
    noise: list[torch.Tensor] = []
    sums: list[float] = []
    for req in requests:
        answer = outputs[req.request_id].outputs[0]
        rows, theirs = (
            plain_logits(m, req, answer.token_ids)[len(req.prompt.token_ids) - 1 : -1].log_softmax(-1)
            for m in (model, rounded)
        )
        own = rows[torch.arange(len(answer.token_ids)), torch.tensor(answer.token_ids)]
        behind.append(rows.amax(-1) - own)
        noise.append((rows - theirs).abs().flatten())
        sums.append((answer.cumulative_logprob - float(own.sum())) / len(answer.token_ids))
    # Of two tokens' logits, each off by what one may be off, in a sample that is not the largest of all.
    bound = 3 * float(torch.cat(noise).max())
    assert float(torch.cat(behind).max()) < bound, "a token is not the likeliest"
    assert max(map(abs, sums)) < bound


def original(rng: random.Random) -> PreparedPicture:
    """Noise that the device is to resize and cut."""
    noise = np.random.default_rng(rng.randrange(2**32))
    pixels = noise.integers(0, 256, (rng.randint(1, 150), rng.randint(1, 150), 3), np.uint8)
    prepared = prepare_picture(Picture(pixels), SliceRules(scale_resolution=56), 4, Originals())
    assert prepared.original is not None
    return prepared


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pictures_that_the_device_resizes_while_others_decode(
    model: MiniCPMV, seed: int, dtype: torch.dtype
) -> None:
    rng = random.Random(seed)
    engine = engine_on_gpu(model, dtype, num_blocks=300, max_encoder_slices=6)
    assert engine.takes_originals
    assert engine.scheduler.encodes_beside
    pictures = [original(rng) for _ in range(8)]
    requests = [request("text", words(rng, 5), greedy(100))]
    for i in range(24):
        parts = [*words(rng, 3), rng.choice(pictures), *words(rng, 3), original(rng), *words(rng, 2)]
        requests.append(request(f"r{i}", parts, greedy(rng.choice([1, 5, 20]))))
    outputs = drive(engine, requests, rng)
    check_answers(model, requests, outputs, dtype)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("graphs", [True, False])
def test_embeddings_do_not_depend_on_the_path(
    model: MiniCPMV, seed: int, dtype: torch.dtype, graphs: bool
) -> None:
    """Cut by Pillow or here, launched or captured: the patches are equal, so the embeddings are within rounding."""
    rng = random.Random(seed)
    on_gpu = copy.deepcopy(model).to("cuda", dtype)
    device, host = PictureEncoder(on_gpu, 8, graphs=graphs), PictureEncoder(on_gpu, 8, on_device=False)
    assert device.takes_originals
    batches = [[original(rng) for _ in range(rng.randint(1, 4))] for _ in range(3)]
    # Whatever the others are, this one is small enough for a graph.
    batches.append(
        [
            prepare_picture(
                Picture(np.full((20, 30, 3), 128, np.uint8)), SliceRules(scale_resolution=56), 1, Originals()
            )
        ]
    )
    exact = [[model.encode_slices(list(p.slices)) for p in batch] for batch in batches]
    off: dict[str, float] = {"mine": 0.0, "theirs": 0.0}
    for _ in range(4):
        for batch, wanted in zip(batches, exact, strict=True):
            got, ready = device.encode(batch)
            assert ready is not None
            ready.wait()
            for mine, theirs, want in zip(got, host.encode(batch)[0], wanted, strict=True):
                for name, found in (("mine", mine), ("theirs", theirs)):
                    off[name] = max(off[name], float((found.float().cpu() - want).abs().max()))
    # Each is as far from float32 as 16 bits take it, on its own way through the batch.
    largest = max(float(want.abs().max()) for wanted in exact for want in wanted)
    assert off["mine"] < 3 * off["theirs"]
    assert off["theirs"] < 20 * torch.finfo(dtype).eps * largest
    assert graphs == bool(device._graphs)
    assert not graphs or device._graphs[True].num_captured


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_prompts_are_captured(model: MiniCPMV, seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    engine = engine_on_gpu(model, dtype, num_blocks=300, max_num_batched_tokens=400)
    requests = [
        request(
            f"r{i}",
            [*words(rng, rng.randint(1, 60)), picture(rng, rng.randint(1, 3)), *words(rng, 2)],
            greedy(2),
        )
        for i in range(24)
    ]
    outputs = drive(engine, requests, rng)
    check_answers(model, requests, outputs, dtype)
    assert engine.runner._step_graphs is not None
    assert engine.runner._step_graphs.num_captured


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_prompts_beside_decodes_are_captured(model: MiniCPMV, seed: int, kv_cache_dtype: str) -> None:
    """Steps of decodes, of prompts and of pieces of prompts, by graphs but for the first ones; eight bits as well."""
    rng = random.Random(seed)
    config = {"num_blocks": 300, "max_num_batched_tokens": 90, "kv_cache_dtype": kv_cache_dtype}
    eager, engine = (
        engine_on_gpu(model, torch.float16, enforce_eager=flag, **config) for flag in (True, False)
    )
    # Prompts alone: nothing is left to decode.
    for i in range(3):
        drive(engine, [request(f"alone{i}", words(rng, 30), greedy(1))])
    requests = [
        request(f"r{i}", words(rng, rng.randint(1, 200)), greedy(rng.randint(1, 40))) for i in range(40)
    ]
    outputs = drive(engine, requests, random.Random(seed))
    graphs = engine.runner._step_graphs
    assert graphs is not None
    assert {size.decodes > 0 for size, graph in graphs._graphs.items() if graph is not None} == {True, False}
    if kv_cache_dtype == "auto":
        check_answers(model, requests, outputs, torch.float16)
    theirs = drive(eager, requests, random.Random(seed))
    same = sum(
        outputs[req.request_id].outputs[0].token_ids == theirs[req.request_id].outputs[0].token_ids
        for req in requests
    )
    # Decodes sum up in other parts: a tie may fall the other way.
    assert same >= 34


def test_graphs_change_nothing(model: MiniCPMV, seed: int) -> None:
    """The same kernels run in both ways, so the tokens are equal, batch by batch."""
    rng = random.Random(seed)
    requests = [request(f"r{i}", words(rng, rng.randint(1, 50)), greedy(24)) for i in range(7)]
    eager, graphs = (
        drive(engine_on_gpu(model, torch.float16, enforce_eager=flag), requests) for flag in (True, False)
    )
    for req in requests:
        assert eager[req.request_id].outputs[0].token_ids == graphs[req.request_id].outputs[0].token_ids


def test_beams_and_samples_on_the_gpu(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    beams = SamplingParams(
        temperature=0, use_beam_search=True, best_of=3, n=3, max_tokens=12, ignore_eos=True
    )
    sampled = SamplingParams(
        temperature=0.9, top_k=20, top_p=0.9, seed=5, n=2, max_tokens=12, ignore_eos=True
    )
    requests = [request("b", words(rng, 30), beams), request("s", [*words(rng, 9), picture(rng, 2)], sampled)]
    outputs = drive(engine_on_gpu(model, torch.float16), requests)
    again = drive(engine_on_gpu(model, torch.float16), requests)
    for name in ("b", "s"):
        assert outputs[name].error is None
        assert [o.token_ids for o in outputs[name].outputs] == [o.token_ids for o in again[name].outputs]
    for req in requests:
        for answer in outputs[req.request_id].outputs:
            rows = plain_logits(model, req, answer.token_ids)[len(req.prompt.token_ids) - 1 : -1].log_softmax(
                -1
            )
            own = rows[torch.arange(12), torch.tensor(answer.token_ids)]
            assert answer.cumulative_logprob == pytest.approx(float(own.sum()), abs=0.3)
            assert max(answer.token_ids) < VOCAB


def searches(rng: random.Random, count: int) -> list[EngineRequest]:
    """Of several widths, some of which end early, beside greedy requests."""
    requests = []
    for i in range(count):
        width = rng.randint(2, 5)
        params = SamplingParams(
            temperature=0,
            use_beam_search=True,
            best_of=width,
            n=rng.randint(1, width),
            max_tokens=rng.choice([1, 9, 40]),
            early_stopping=rng.choice([True, False, "never"]),
            length_penalty=rng.choice([0.0, 1.0, 2.5]),
            stop_token_ids=rng.sample(range(VOCAB), rng.choice([0, 3, 20])),
            ignore_eos=True,
            logprobs=rng.choice([None, 2]),
        )
        requests.append(request(f"b{i}", words(rng, rng.randint(1, 40)), params))
        requests.append(request(f"g{i}", words(rng, rng.randint(1, 40)), greedy(rng.choice([5, 20]))))
    return requests


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_searches_advance_on_the_gpu(seed: int, enforce_eager: bool, kv_cache_dtype: str) -> None:
    """Graphs and launched kernels, arrivals at any time, pools that are too small: each answer's sum is the plain
    model's, and that the host's decisions are the device's is asserted in each step."""
    rng = random.Random(seed)
    model = tiny_model(31, head_dim=64)
    requests = searches(rng, 8)
    engine = engine_on_gpu(
        model, torch.float16, num_blocks=40, enforce_eager=enforce_eager, kv_cache_dtype=kv_cache_dtype
    )
    outputs = drive(engine, requests, rng)
    assert engine._device_beams is not None
    assert type(engine._device_beams.ops) is not BeamOps, "the log says what is wrong with the kernels"
    attention = None if kv_cache_dtype == "auto" else ThroughEightBits(kv_cache_dtype, 64)
    each = {"auto": 0.03, "int8": 0.3, "fp8": 1.0}[kv_cache_dtype]
    for req in requests:
        assert outputs[req.request_id].error is None
        for answer in outputs[req.request_id].outputs:
            ids = answer.token_ids
            logits = plain_logits(model, req, ids, attention)[len(req.prompt.token_ids) - 1 : -1]
            own = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
            # A beam that read another's past would be off by several a token.
            assert answer.cumulative_logprob == pytest.approx(float(own.sum()), abs=each * len(ids))


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_searches_on_the_gpu_are_the_host_s(model: MiniCPMV, seed: int, enforce_eager: bool) -> None:
    """The same kernels compute the logits. Of those that are equal, as many in 16 bits are, any may come first."""
    rng = random.Random(seed)
    equal = total = 0
    for req in searches(rng, 16):
        if not req.params.use_beam_search or req.params.max_tokens == 1:
            continue
        found = []
        for run_ahead in (False, True):
            engine = engine_on_gpu(
                model, torch.float16, num_blocks=200, enforce_eager=enforce_eager, run_ahead=run_ahead
            )
            found.append(drive(engine, [req])[req.request_id])
        assert found[1].error is None
        host, device = ([(a.token_ids, a.finish_reason) for a in output.outputs] for output in found)
        equal += host == device
        total += 1
    assert 2 * equal >= total


@pytest.mark.parametrize("vocab, width", [(151666, 3), (151666, 8), (73448, 4)])
def test_beam_kernels_at_full_size(seed: int, vocab: int, width: int) -> None:
    """Candidates and decisions of the kernels are those of torch on logits as a bfloat16 model gives them."""
    from huoyan.engine.beam_ops_cuda import KernelBeamOps
    from huoyan.kernels.beam_candidates import beam_candidates_reference

    device = torch.device("cuda")
    g = torch.Generator(device).manual_seed(seed)
    logits = (torch.randn(width, vocab, generator=g, device=device) * 3).bfloat16().float()
    host = random_orders(torch.Generator().manual_seed(seed), width, 1, 0, torch.device("cpu"))
    host.table[0, 0] = width
    host.table[0, HEAD : HEAD + width] = torch.arange(width)
    orders = SearchOrders(host.table.to(device), width, host.stops)
    found, state = KernelBeamOps().advance(logits, orders, None, 2 * width)
    values, ids = beam_candidates_reference(logits, orders.rows, 2 * width)
    whole, bits = found[:, :, FACTS:].split(2 * width, 2)
    assert torch.equal(whole.long(), ids)
    torch.testing.assert_close(bits.contiguous().view(torch.float32), values, rtol=1e-5, atol=1e-5)
    plain = found.clone()
    assert torch.equal(advance(orders, plain, None), state)
    assert torch.equal(plain, found)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_e5m2"])
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_eight_bits_on_the_gpu(seed: int, name: str, enforce_eager: bool) -> None:
    """A number that float16 rounds to its neighbour costs about what 8 bits cost at all."""
    rng = random.Random(seed)
    model = tiny_model(31, head_dim=64)
    requests = [request(f"r{i}", words(rng, rng.randint(1, 60)), greedy(12)) for i in range(8)]
    engine = engine_on_gpu(model, torch.float16, kv_cache_dtype=name, enforce_eager=enforce_eager)
    attention = ThroughEightBits(name, 64)
    for request_id, output in drive(engine, requests, rng).items():
        req = next(r for r in requests if r.request_id == request_id)
        ids = output.outputs[0].token_ids
        logits = plain_logits(model, req, ids, attention)[len(req.prompt.token_ids) - 1 : -1]
        behind = logits.amax(-1) - logits[torch.arange(len(ids)), torch.tensor(ids)]
        assert float(behind.max()) < {"int8": 0.3, "fp8": 1.0, "fp8_e5m2": 2.0}[name]


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_guesses_on_the_gpu(model: MiniCPMV, seed: int, enforce_eager: bool) -> None:
    rng = random.Random(seed)
    requests = [request(f"r{i}", words(rng, rng.randint(1, 50)), greedy(24)) for i in range(5)]
    answers = {
        name: output.outputs[0].token_ids
        for name, output in drive(engine_on_gpu(model, torch.float16), requests).items()
    }
    speculation = NgramSpeculation(3, 2, 1)
    engine = engine_on_gpu(model, torch.float16, speculation=speculation, enforce_eager=enforce_eager)
    engine._speculator = Known(speculation, answers)
    for name, output in drive(engine, requests).items():
        req = next(r for r in requests if r.request_id == name)
        ids = output.outputs[0].token_ids
        logits = plain_logits(model, req, ids)[len(req.prompt.token_ids) - 1 : -1]
        behind = logits.amax(-1) - logits[torch.arange(len(ids)), torch.tensor(ids)]
        assert float(behind.max()) < NOISE[torch.float16]
    assert engine.stats().accepted_tokens


class Known(Speculator):
    """Guesses what was said before, which rounding may have changed since."""

    def __init__(self, config: NgramSpeculation, answers: dict[str, list[int]]) -> None:
        super().__init__(config)
        self.answers = answers

    def propose(self, seq: Sequence, most: int) -> list[int]:
        said = len(seq.output_ids)
        return self.answers[seq.group.request_id][said : said + min(most, 3)]
