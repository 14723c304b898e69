"""Requests that arrive when they arrive, whether earlier ones are done or not, through `AsyncLLM`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.api.prompts import ChatPrompt
from huoyan.bench.requests import Requests, params, parse_pictures, size_up
from huoyan.bench.rows import Row, median, percentile
from huoyan.bench.timing import Timeline

if TYPE_CHECKING:
    from huoyan.api.async_llm import AsyncLLM
    from huoyan.api.driver import Job
    from huoyan.bench.opened import Opened


@dataclass(frozen=True)
class Arrivals:
    """`count` requests, `rate` a second on average, at random (Poisson)."""

    rate: float
    count: int
    seed: int

    def times(self) -> list[float]:
        """Seconds after the beginning, the first at 0."""
        rng = random.Random(self.seed)
        found = [0.0]
        while len(found) < self.count:
            found.append(found[-1] + rng.expovariate(self.rate))
        return found


def serve(
    model: Opened, requests: Requests, arrivals: Arrivals, pictures: Sequence[str], output: int
) -> list[Row]:
    """One run. A row for each kind of picture (they take turns), and one for all.

    The time between tokens is counted over all requests, hence while the pictures of others are encoded and
    their prompts computed. Its limit, and that of the first token, are those of a request that is alone.
    """
    kinds = [pictures[i % len(pictures)] for i in range(arrivals.count)]
    sampling = params(output)
    jobs = [requests.pictures(parse_pictures(kind), sampling) for kind in kinds]
    asked = {
        kind: size_up(
            model.runtime,
            requests.pictures(parse_pictures(kind), sampling),
            model.engine.model.config.vision.patch_size,
        )
        for kind in set(kinds)
    }
    warm = [requests.pictures(parse_pictures(kind), sampling) for kind in sorted(set(kinds))]
    llm = model.async_llm()
    lines, seconds = asyncio.run(_run(llm, warm, jobs, arrivals.times()))
    rows = []
    for kind in dict.fromkeys(kinds):
        of_kind = [line for line, own in zip(lines, kinds, strict=True) if own == kind]
        row = _row(f"{len(of_kind)} x {'words' if kind == 'none' else kind}", of_kind)
        row.limits["first_token_ms"] = 1e3 * model.rooflines.first_token(asked[kind])
        row.limits["inter_token_ms"] = 1e3 * model.rooflines.mean_step(asked[kind])
        rows.append(row)
    whole = _row(f"all {len(lines)}", lines)
    whole.measured["tokens_per_s"] = sum(line.seen for line in lines) / seconds
    whole.measured["requests_per_s"] = len(lines) / seconds
    whole.measured["offered_per_s"] = arrivals.rate
    each = model.rooflines.all_of([asked[kind] for kind in kinds]) / len(kinds)
    # What the device could serve were they all there: more than is asked for says that there is room.
    whole.limits["requests_per_s"] = 1 / each
    return [*rows, whole]


async def _run(
    llm: AsyncLLM, warm: Sequence[Job], jobs: Sequence[Job], times: Sequence[float]
) -> tuple[list[Timeline], float]:
    await asyncio.gather(*(_one(llm, job, time.perf_counter()) for job in warm))
    begun = time.perf_counter()
    # A request's clock starts when it was to arrive: a late start is the server's to answer for.
    lines = await asyncio.gather(
        *(_one(llm, job, begun + after) for job, after in zip(jobs, times, strict=True))
    )
    return list(lines), time.perf_counter() - begun


async def _one(llm: AsyncLLM, job: Job, at: float) -> Timeline:
    await asyncio.sleep(max(at - time.perf_counter(), 0))
    line = Timeline(at)
    prompt = job.prompt
    assert isinstance(prompt, ChatPrompt)
    async for output in llm.chat(prompt.messages, job.params, job.request_id):
        line.note(output, time.perf_counter())
    return line


def _row(name: str, lines: Sequence[Timeline]) -> Row:
    gaps = [gap for line in lines for gap in line.gaps]
    firsts = [line.first_token for line in lines]
    measured = {"first_token_ms": 1e3 * median(firsts), "first_token_p99_ms": 1e3 * percentile(firsts, 0.99)}
    if gaps:
        measured["inter_token_ms"] = 1e3 * median(gaps)
        measured["inter_token_p99_ms"] = 1e3 * percentile(gaps, 0.99)
    return Row(name, measured)
