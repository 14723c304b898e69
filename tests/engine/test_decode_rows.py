"""Batches of decodes from the step before are what `build_batch` makes of the schedule alone."""

from __future__ import annotations

import random

import numpy as np
import pytest

from huoyan.engine.batch import Batch, build_batch
from huoyan.engine.engine import Engine
from huoyan.engine.schedule import Schedule
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.harness import drive, small_config
from tests.engine.support import tiny_model
from tests.engine.test_run_ahead import random_request


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return tiny_model(53)


def test_batches_are_those_of_the_schedule_alone(model: MiniCPMV, seed: int) -> None:
    """With requests that come, go, fork and are preempted, blocks that are shared, and tokens in flight."""
    rng = random.Random(seed)
    made = left = 0
    for _ in range(25):
        engine = Engine(model, small_config(rng))
        plain = engine.runner._decode_rows.batch

        def checked(schedule: Schedule, engine: Engine = engine, plain=plain) -> Batch | None:  # type: ignore[no-untyped-def]
            nonlocal made, left
            batch: Batch | None = plain(schedule)
            if batch is None:
                left += 1
                assert schedule.prefills or any(c.sequence.group.width > 1 for c in schedule.decodes)
                return None
            made += 1
            check_same(batch, build_batch(schedule, engine.pool.block_size))
            return batch

        engine.runner._decode_rows.batch = checked  # type: ignore[method-assign]
        drive(engine, [random_request(rng, f"r{i}") for i in range(rng.randint(1, 10))], rng)
    assert made > 50
    assert left > 50


def check_same(batch: Batch, expected: Batch) -> None:
    assert batch.chunks == expected.chunks
    assert batch.num_decodes == expected.num_decodes
    assert batch.in_flight == expected.in_flight
    for name in ("token_ids", "positions", "slot_mapping", "cu_seqlens_q", "seq_lens", "block_tables"):
        got, wanted = getattr(batch, name), getattr(expected, name)
        assert got.dtype == wanted.dtype, name
        assert np.array_equal(got, wanted), name
    # The rows are sampled in the batch's own order.
    assert batch.sampling == batch.chunks
    assert batch.sampled_rows.tolist() == list(range(len(batch.chunks)))
    assert {
        id(c.sequence): int(r) for c, r in zip(expected.sampling, expected.sampled_rows, strict=True)
    } == {id(c.sequence): int(r) for c, r in zip(batch.sampling, batch.sampled_rows, strict=True)}


def test_last_outputs_are_all_that_is_made_where_nobody_streams(model: MiniCPMV, seed: int) -> None:
    rng = random.Random(seed)
    requests = [random_request(rng, f"r{i}") for i in range(6)]
    engine = Engine(
        model, small_config(rng, num_blocks=200, block_size=4, max_num_seqs=6, max_num_batched_tokens=24)
    )
    streamed = drive(engine, requests)
    for request in requests:
        request.streamed = False
    engine = Engine(
        model, small_config(rng, num_blocks=200, block_size=4, max_num_seqs=6, max_num_batched_tokens=24)
    )
    outputs: list[str] = []
    step = engine.step

    def noted():  # type: ignore[no-untyped-def]
        found = step()
        assert all(output.finished for output in found)
        outputs.extend(output.request_id for output in found)
        return found

    engine.step = noted  # type: ignore[method-assign]
    quiet = drive(engine, requests)
    assert sorted(outputs) == sorted(quiet)
    for name, output in streamed.items():
        assert [a.token_ids for a in output.outputs] == [a.token_ids for a in quiet[name].outputs]
