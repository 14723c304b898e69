"""The scheduler by itself: what it promises a runner that works ahead of the host."""

from __future__ import annotations

import random
from collections import deque

from huoyan.engine.block_pool import BlockPool
from huoyan.engine.picture_cache import PictureCache
from huoyan.engine.request import EngineRequest
from huoyan.engine.schedule import Chunk, Schedule
from huoyan.engine.scheduler import Scheduler
from huoyan.engine.sequence import Group
from tests.engine.support import VOCAB, greedy, request, words


def make(rng: random.Random, **sizes: int) -> Scheduler:
    pool = BlockPool(sizes.get("num_blocks", 40), sizes.get("block_size", 4), rng.random() < 0.7)
    return Scheduler(
        pool,
        PictureCache(1 << 20, 1),
        max_model_len=100,
        max_num_seqs=sizes.get("max_num_seqs", 4),
        max_num_batched_tokens=sizes.get("budget", 9),
        max_encoder_slices=4,
    )


def test_steps_can_be_planned_before_their_tokens_are_known(seed: int) -> None:
    """The ids of a step arrive one or two steps late; every position is still computed, in order, once."""
    rng = random.Random(seed)
    ahead = preemptions = 0
    for _ in range(30):
        scheduler = make(rng, num_blocks=rng.randint(8, 20), budget=rng.randint(4, 20))
        groups: list[Group] = []
        computed: dict[int, int] = {}
        in_flight: deque[list[Chunk]] = deque()
        lag = rng.randint(0, 2)
        todo = [
            request(f"r{i}", words(rng, rng.randint(1, 20)), greedy(rng.randint(1, 12))) for i in range(8)
        ]
        for _ in range(2000):
            if todo and rng.random() < 0.5:
                req = todo.pop()
                groups.append(scheduler.add(req, 1, req.params.max_tokens))
            schedule = scheduler.schedule()
            for group in schedule.preempted:
                computed[group.order] = 0
                preemptions += 1
            for chunk in schedule.chunks:
                seq = chunk.sequence
                begun = computed.get(seq.group.order, 0)
                # A first chunk may begin after a cached prefix.
                assert chunk.start == begun or begun == 0
                computed[seq.group.order] = chunk.end
                assert chunk.end < seq.group.max_length
                ahead += chunk.end > seq.num_known
            scheduler.launched(schedule)
            scheduler.check()
            in_flight.append([chunk for chunk in schedule.chunks if chunk.samples])
            while len(in_flight) > lag:
                for chunk in in_flight.popleft():
                    seq = chunk.sequence
                    scheduler.sampled(seq, rng.randrange(VOCAB))
                    if seq.num_known == seq.group.max_length:
                        scheduler.finish(seq.group)
            if not todo and not scheduler.has_unfinished:
                break
        else:
            raise AssertionError("no end")
        for group in groups:
            assert group.finished
            assert len(group.sequences[0].output_ids) == group.max_length - group.prompt_len
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert ahead, "no step was planned ahead of its tokens"
    assert preemptions


def test_a_late_request_does_not_overtake(seed: int) -> None:
    """A small request waits behind one that does not fit yet."""
    rng = random.Random(seed)
    scheduler = make(rng, num_blocks=12, budget=64)
    running = request("running", words(rng, 20), greedy(20))
    large = request("large", words(rng, 40), greedy(2))
    small = request("small", words(rng, 2), greedy(2))
    for req in (running, large, small):
        scheduler.add(req, 1, req.params.max_tokens)
    schedule = scheduler.schedule()
    assert [chunk.sequence.group.request_id for chunk in schedule.chunks] == ["running"]


def test_work_is_done_when_it_can_be(seed: int) -> None:
    """While tokens wait and blocks are free, the budget is used up."""
    rng = random.Random(seed)
    for _ in range(20):
        budget = rng.randint(6, 30)
        scheduler = make(rng, num_blocks=400, budget=budget, max_num_seqs=6)
        waiting = 0
        for i in range(6):
            req = request(f"r{i}", words(rng, rng.randint(1, 40)), greedy(3))
            waiting += len(req.prompt.token_ids)
            scheduler.add(req, 1, 3)
        while waiting:
            schedule = scheduler.schedule()
            prompt_tokens = sum(chunk.num_tokens for chunk in schedule.prefills)
            assert schedule.num_tokens == min(budget, waiting + len(schedule.decodes))
            waiting -= prompt_tokens
            scheduler.launched(schedule)
            for chunk in schedule.chunks:
                if chunk.samples:
                    scheduler.sampled(chunk.sequence, rng.randrange(VOCAB))
                    if chunk.sequence.length == chunk.sequence.group.max_length:
                        scheduler.finish(chunk.sequence.group)


def in_bulk(rng: random.Random, name: str, length: int, tokens: int) -> EngineRequest:
    req = request(name, words(rng, length), greedy(tokens))
    req.in_bulk = True
    return req


def drained(scheduler: Scheduler, rng: random.Random) -> list[Schedule]:
    """All steps up to the last, the host one step late."""
    steps: list[Schedule] = []
    before: list[Chunk] = []
    while scheduler.has_unfinished:
        schedule = scheduler.schedule()
        assert schedule.chunks or before, "nothing is done although something waits"
        scheduler.launched(schedule)
        for chunk in before:
            scheduler.sampled(chunk.sequence, rng.randrange(VOCAB))
            if chunk.sequence.num_known == chunk.sequence.group.max_length:
                scheduler.finish(chunk.sequence.group)
        before = [chunk for chunk in schedule.chunks if chunk.samples]
        steps.append(schedule)
        assert len(steps) < 5000
    return steps


def test_decodes_wait_for_prompts_that_fill_steps_where_only_the_whole_counts(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {"num_blocks": 400, "budget": 40, "max_num_seqs": 20}
    requests = [(rng.randint(5, 30), rng.randint(5, 30)) for _ in range(16)]
    for watched in (None, 0, 15):
        scheduler = make(rng, **sizes)
        for i, (length, tokens) in enumerate(requests):
            req = in_bulk(rng, f"r{i}", length, tokens)
            req.in_bulk = i != watched
            scheduler.add(req, 1, tokens)
        steps = drained(scheduler, rng)
        assert all(step.num_tokens <= 40 for step in steps)
        left = sum(length for length, _ in requests)
        while_they_fill = 0
        for step in steps:
            while_they_fill += bool(step.decodes and left >= 40)
            left -= sum(chunk.num_tokens for chunk in step.prefills)
        assert not left
        assert bool(while_they_fill) == (watched == 0), (
            "the last one to come decodes when the prompts are done"
        )


def test_bulk_ends_whatever_memory_there_is(seed: int) -> None:
    """Few blocks, few seats: held back or not, each answer is as long as it was asked for."""
    rng = random.Random(seed)
    for _ in range(20):
        scheduler = make(
            rng, num_blocks=rng.randint(12, 40), budget=rng.randint(6, 30), max_num_seqs=rng.randint(1, 6)
        )
        groups = []
        for i in range(12):
            tokens = rng.randint(1, 15)
            req = in_bulk(rng, f"r{i}", rng.randint(1, 25), tokens)
            req.in_bulk = rng.random() < 0.9
            groups.append(scheduler.add(req, 1, tokens))
        drained(scheduler, rng)
        for group in groups:
            assert len(group.sequences[0].output_ids) == group.max_length - group.prompt_len
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
