"""Running jobs with a clock beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from huoyan.errors import HuoyanError, InputError

if TYPE_CHECKING:
    from huoyan.api.driver import Job
    from huoyan.api.llm import LLM
    from huoyan.api.outputs import RequestOutput


@dataclass
class Timeline:
    """When one request was asked and when its tokens came, in seconds of one clock.

    `tokens` has the time and the number of tokens that came then: an output may bring several at once.
    """

    asked: float
    tokens: list[tuple[float, int]] = field(default_factory=list)
    seen: int = 0

    def note(self, output: RequestOutput, now: float) -> None:
        """Take the time of an output that has more tokens than the last.

        Raises:
            HuoyanError: the request failed; a number from it would mean nothing.
        """
        if output.error is not None:
            # What the engine itself got wrong is no fault of the request.
            raise (HuoyanError if output.error.startswith("internal error") else InputError)(output.error)
        count = max((len(answer.token_ids) for answer in output.outputs), default=0)
        if count > self.seen:
            self.tokens.append((now, count - self.seen))
            self.seen = count

    @property
    def first_token(self) -> float:
        return self.tokens[0][0] - self.asked

    @property
    def answer(self) -> float:
        return self.tokens[-1][0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; those that come together share the time since the last."""
        found: list[float] = []
        for (before, _), (now, count) in zip(self.tokens, self.tokens[1:], strict=False):
            found += [(now - before) / count] * count
        return found


@dataclass
class Run:
    """Jobs that were run at once."""

    seconds: float
    timelines: list[Timeline]

    @property
    def tokens(self) -> int:
        return sum(line.seen for line in self.timelines)


def run_jobs(llm: LLM, jobs: Sequence[Job]) -> Run:
    """Run jobs at once, preparing their pictures included.

    Raises:
        HuoyanError: one of them failed.
    """
    begun = time.perf_counter()
    lines = {job.request_id: Timeline(begun) for job in jobs}
    for output in llm.run_jobs(jobs):
        lines[output.request_id].note(output, time.perf_counter())
    return Run(time.perf_counter() - begun, list(lines.values()))


def repeated(llm: LLM, make: Callable[[], Sequence[Job]], *, warmup: int, repeats: int) -> list[Run]:
    """Run new jobs of one kind `warmup` times unseen and `repeats` times."""
    for _ in range(warmup):
        run_jobs(llm, make())
    return [run_jobs(llm, make()) for _ in range(repeats)]
