"""The parts that numbers go through between the clock and the table."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from huoyan.api.outputs import CompletionOutput, RequestOutput
from huoyan.bench.probe import probe
from huoyan.bench.requests import parse_numbers, parse_pictures, slice_patches
from huoyan.bench.rooflines import Ask, Rooflines, weight_format
from huoyan.bench.rows import Row, columns, median, percentile, readable, table
from huoyan.bench.serve import Arrivals
from huoyan.bench.timing import Timeline
from huoyan.errors import HuoyanError, InputError
from huoyan.media.slicing import cut_slices, plan_slices
from huoyan.media.types import SliceRules
from huoyan.models import costs
from huoyan.models.costs import Speed, WeightFormat
from huoyan.models.weights import build_model, quantize_randomly
from tests.models.small import small_config


def output(tokens: int, error: str | None = None) -> RequestOutput:
    answer = CompletionOutput(0, "", list(range(tokens)))
    return RequestOutput("r", None, [1], [answer], False, error=error)


def test_percentiles_are_numpys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=rng.integers(1, 30)).tolist()
    for part in (0.0, 0.5, 0.99, 1.0, float(rng.random())):
        assert percentile(values, part) == pytest.approx(np.quantile(values, part))
    assert median(values) == pytest.approx(np.median(values))


def test_a_timeline_shares_the_time_of_tokens_that_come_together() -> None:
    line = Timeline(asked=10.0)
    for count, now in ((0, 10.5), (1, 11.0), (1, 11.5), (2, 12.0), (5, 13.5)):
        line.note(output(count), now)
    assert line.first_token == 1.0
    assert line.gaps == [1.0, 0.5, 0.5, 0.5]
    assert line.answer == 3.5
    assert line.seen == 5
    with pytest.raises(HuoyanError, match="too long"):
        line.note(output(0, "too long"), 14.0)


def test_table() -> None:
    rows = [
        Row("fast", {"first_token_ms": 20.0, "requests_per_s": 5.0}, {"requests_per_s": 10.0}),
        Row("slower one", {"first_token_ms": 12345.6, "step_ms": 4.0}, {"step_ms": 1.0}),
    ]
    assert table(rows).splitlines() == [
        "            first token, ms  step, ms  limit  reached  requests/s  limit  reached",
        "fast                   20.0                                  5.00   10.0     50 %",
        "slower one            12346      4.00   1.00     25 %",
    ]
    assert columns([["a", "b"], ["cc", "1"]]) == "a   b\ncc  1"
    shown = [readable(v) for v in (None, 0.0123, 0.5, 9.99, 9.996, 99.94, 99.96, 1234.5)]
    assert shown == ["", "0.012", "0.50", "9.99", "10.0", "99.9", "100", "1234"]


def test_sizes_of_pictures() -> None:
    assert parse_pictures("640x360") == [(640, 360)]
    assert parse_pictures("8x9*3") == [(8, 9)] * 3
    assert parse_pictures("none") == []
    assert parse_numbers("1,8, 64", "--batch") == [1, 8, 64]
    for wrong in ("640", "x", "0x5", "5x5*0", "5x5*", "640x360,8x8", ""):
        with pytest.raises(InputError, match="no size of pictures"):
            parse_pictures(wrong)
    for wrong in ("", "0", "1,,2", "a", "-1"):
        with pytest.raises(InputError, match="--batch"):
            parse_numbers(wrong, "--batch")


def test_patches_are_those_of_the_slices(seed: int) -> None:
    rng = random.Random(seed)
    rules = SliceRules(scale_resolution=56, max_slice_nums=rng.randint(1, 9))
    size = (rng.randint(20, 300), rng.randint(20, 300))
    plan = plan_slices(size, rules)
    slices = cut_slices(np.zeros((size[1], size[0], 3), np.uint8), plan)
    assert slice_patches(plan, 14) == [(s.shape[0] // 14) * (s.shape[1] // 14) for s in slices]


def test_arrivals_are_a_poisson_process(seed: int) -> None:
    rate = random.Random(seed).uniform(0.5, 50)
    times = Arrivals(rate, 4000, seed).times()
    gaps = np.diff(times)
    assert times[0] == 0
    assert len(times) == 4000
    # Of an exponential distribution: mean 1/rate, as large a deviation; five of their standard errors.
    assert abs(gaps.mean() * rate - 1) < 5 / 4000**0.5
    assert abs(gaps.std() * rate - 1) < 5 * 2**0.5 / 4000**0.5
    assert times == Arrivals(rate, 4000, seed).times()


def lines(seed: int, speed: Speed) -> Rooflines:
    rng = random.Random(seed)
    config = small_config(num_hidden_layers=rng.randint(1, 4), vocab_size=rng.randint(300, 900))
    return Rooflines(config, WeightFormat(4), costs.kv_token_bytes(config.text, 4), speed)


def test_rooflines_add_up(seed: int) -> None:
    rng = random.Random(seed)
    reading = lines(seed, Speed(1e6, 1e30))
    computing = lines(seed, Speed(1e30, 1e6))
    asked = Ask(tuple(rng.randint(1, 99) for _ in range(3)), rng.randint(1, 50), rng.randint(1, 9))
    for one in (reading, computing):
        # Where only one of the two counts, a request alone is its parts.
        steps = [one.step([asked.prompt + t]) for t in range(1, asked.answer)]
        assert one.all_of([asked]) == pytest.approx(one.first_token(asked) + sum(steps))
    count = rng.randint(2, 5)
    # Operations grow with the requests, save that the resampler's queries are the same for all slices.
    width = computing.config.text.hidden_size
    once = 2 * computing.config.query_num * width * width
    spared = count * computing.all_of([asked]) - computing.all_of([asked] * count)
    assert spared * 1e6 == pytest.approx((count - 1) * once)
    # Weights are read once for all of them.
    weights = costs.decoder_bytes(reading.config.text, WeightFormat(4))
    weights += costs.head_bytes(reading.config.text, WeightFormat(4))
    picture = costs.encoder_bytes(reading.config, WeightFormat(4))
    saved = count * reading.all_of([asked]) - reading.all_of([asked] * count)
    assert saved * 1e6 == pytest.approx((count - 1) * (weights * asked.answer + picture))
    both = replace(reading, speed=Speed(1e6, 1e6))
    assert both.all_of([asked]) >= max(reading.all_of([asked]), computing.all_of([asked]))


def test_an_answer_of_beams_reads_its_prompt_once(seed: int) -> None:
    reading = lines(seed, Speed(1.0, 1e30))
    asked = Ask((), 100, 20)
    one, three = reading.mean_step(asked), reading.mean_step(asked, 3)
    rows = 2 * (4 * reading.config.text.hidden_size + 11 * reading.kv_token)
    assert three - one == pytest.approx(rows)


def test_the_format_is_read_off_the_model(seed: int) -> None:
    model = build_model(small_config(), seed=seed)
    assert weight_format(model) == WeightFormat(4, None, frozenset())
    quantize_randomly(model, 64, seed)
    assert weight_format(model) == WeightFormat(4, 64)


def test_a_probe_finds_speeds() -> None:
    found = probe(torch.device("cpu"), torch.float32, 4 << 20, seconds=0.001)
    assert min(found.copy, found.matvec, found.matmul) > 0
    assert found.speed == Speed(max(found.copy, found.matvec), found.matmul)
    assert "GB/s" in found.line()
