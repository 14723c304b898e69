"""Drives an engine to the end while holding its books after every step."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from huoyan.api.outputs import RequestOutput
from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.answer import ChosenToken
from huoyan.engine.chooser import Choice, Chosen
from huoyan.engine.config import EngineConfig
from huoyan.engine.engine import Engine
from huoyan.engine.in_flight import InFlight
from huoyan.engine.request import EngineRequest
from huoyan.engine.runner import ForwardOutput
from huoyan.engine.schedule import Schedule
from huoyan.engine.sequence import Group, Sequence
from huoyan.errors import InputError
from huoyan.models.minicpmv import MiniCPMV


def small_config(rng: random.Random, **fixed: object) -> EngineConfig:
    """Anything from roomy to hardly enough."""
    seqs = rng.randint(1, 6)
    sizes: dict[str, object] = {
        "block_size": rng.choice([1, 2, 4, 8]),
        "max_num_seqs": seqs,
        "max_num_batched_tokens": rng.choice([seqs, seqs + 1, seqs + 7, 64]),
        "max_encoder_slices": rng.randint(1, 6),
        "picture_cache_bytes": rng.choice([0, 3000, 1 << 20]),
        "enable_prefix_caching": rng.random() < 0.7,
        "run_ahead": rng.random() < 0.5,
        **fixed,
    }
    sizes.setdefault("num_blocks", -(-rng.randint(25, 130) // int(str(sizes["block_size"]))))
    return EngineConfig(**sizes)  # type: ignore[arg-type]


def watch(engine: Engine) -> None:
    """Before every forward: no slot is written twice, no block that is shared or has known contents."""
    forward = engine.runner.forward

    def checked(schedule: Schedule, before: InFlight | None = None) -> ForwardOutput:
        written: set[int] = set()
        size, pool = engine.pool.block_size, engine.pool
        assert schedule.num_tokens <= engine.config.max_num_batched_tokens
        for source, target in schedule.copies:
            assert pool.ref_count(target) == 1
            assert target not in {s for s, _ in schedule.copies}
            assert not pool.is_free(source)
        for chunk in schedule.chunks:
            assert chunk.end > chunk.start
            assert chunk.start == chunk.sequence.num_computed
            for position in range(chunk.start, chunk.end):
                block = chunk.sequence.block_table[position // size]
                slot = block * size + position % size
                assert slot not in written, "two tokens in one slot"
                written.add(slot)
                if pool.ref_count(block) > 1:
                    # Only a preempted group that computes again what its sequences shared before.
                    own = chunk.sequence.token_ids(0, position + 1).tolist()
                    holders = [s for s in chunk.sequence.group.sequences if block in s.block_table]
                    assert len(holders) == pool.ref_count(block), "a shared block is written"
                    assert all(s.token_ids(0, position + 1).tolist() == own for s in holders)
                    assert chunk in schedule.prefills
                    assert chunk.sequence is holders[0]
                    assert chunk.sequence.group.metrics.preemptions
                assert pool._hash_of[block] is None, "known contents are overwritten"
        return forward(schedule, before)

    engine.runner.forward = checked  # type: ignore[method-assign]


class Known(Choice):
    """Tokens that are chosen already."""

    def __init__(self, chosen: dict[Group, Chosen]) -> None:
        self.chosen = chosen
        super().__init__(
            {g: len(tokens) for g, tokens in chosen.items() if not isinstance(tokens, Exception)}
        )

    @property
    def token_ids(self) -> Tensor:
        return torch.tensor([t.token_id for g in self.sampled for t in self.chosen[g]])  # type: ignore[union-attr]

    def read(self) -> dict[Group, Chosen]:
        return self.chosen


class TopFirst:
    """Stands in for the sampler: several samples begin with the likeliest tokens, and all go on greedily."""

    def check(self, params: SamplingParams) -> None:
        pass

    def forked(self, parent: Sequence, child: Sequence) -> None:
        pass

    def forget(self, group: Group) -> None:
        pass

    def choose(
        self,
        logits: Tensor,
        rows: Mapping[Group, list[int]],
        before: InFlight | None = None,
        drafts: Mapping[Group, tuple[int, ...]] | None = None,
    ) -> Choice:
        chosen: dict[Group, Chosen] = {}
        for group, own in rows.items():
            if group.width > 1 and not group.in_lockstep:
                chosen[group] = [ChosenToken(t) for t in logits[own[0]].topk(group.width).indices.tolist()]
            else:
                guesses = len((drafts or {}).get(group, ()))
                assert len(own) == len(group.sequences) + guesses, "a group does not move together"
                chosen[group] = [ChosenToken(int(logits[row].argmax())) for row in own]
        return Known(chosen)


def drive(
    engine: Engine,
    requests: list[EngineRequest],
    rng: random.Random | None = None,
    between: Callable[[int], None] | None = None,
    max_steps: int = 5000,
) -> dict[str, RequestOutput]:
    """Last output of every request. With `rng` they arrive between steps; otherwise all at once."""
    watch(engine)
    todo = requests[::-1]
    last: dict[str, RequestOutput] = {}
    for step in range(max_steps):
        while todo and (rng is None or rng.random() < 0.5):
            request = todo.pop()
            try:
                engine.add_request(request)
            except InputError as error:
                last[request.request_id] = RequestOutput(
                    request.request_id, None, request.prompt.token_ids, [], True, error=str(error)
                )
        if not todo and not engine.has_unfinished_requests():
            break
        if between:
            between(step)
        for output in engine.step():
            before = last.get(output.request_id)
            assert before is None or not before.finished, "an output after the last"
            last[output.request_id] = output
        engine.scheduler.check()
    else:
        raise AssertionError(f"no end after {max_steps} steps: {engine.scheduler.running}")
    assert engine.pool.num_free == engine.pool.num_blocks, "blocks leaked"
    assert not engine.pictures._pins, "pictures leaked"
    assert set(last) == {request.request_id for request in requests}
    assert all(output.finished for output in last.values())
    return last


def alone(model: MiniCPMV, request: EngineRequest) -> RequestOutput:
    """The request in an engine of its own, with room for everything."""
    config = EngineConfig(num_blocks=600, max_num_seqs=16, block_size=16, max_num_batched_tokens=4096)
    with torch.inference_mode():
        return drive(Engine(model, config), [request])[request.request_id]
