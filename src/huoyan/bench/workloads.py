"""The workloads of `huoyan bench` but `serve`: each gives rows of measures with their limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huoyan.bench.requests import Requests, params, parse_pictures, size_up
from huoyan.bench.rows import Row, median, percentile
from huoyan.bench.timing import Run, repeated

if TYPE_CHECKING:
    from huoyan.api.driver import Job
    from huoyan.api.llm import LLM
    from huoyan.bench.opened import Opened
    from huoyan.bench.rooflines import Ask


@dataclass(frozen=True)
class Session:
    """A model to measure, and how often."""

    model: Opened
    llm: LLM
    requests: Requests
    warmup: int
    repeats: int

    def repeated(self, make: Callable[[], Sequence[Job]]) -> list[Run]:
        return repeated(self.llm, make, warmup=self.warmup, repeats=self.repeats)

    def size_up(self, job: Job) -> Ask:
        return size_up(self.model.runtime, job, self.model.engine.model.config.vision.patch_size)


def latency(session: Session, inputs: Sequence[int], output: int, batches: Sequence[int]) -> Iterator[Row]:
    """Text prompts: alone, and so many at once."""
    lines = session.model.rooflines
    for tokens in inputs:
        for batch in batches:

            def jobs(tokens: int = tokens, batch: int = batch) -> list[Job]:
                return [session.requests.words(tokens, params(output)) for _ in range(batch)]

            runs = session.repeated(jobs)
            asked = session.size_up(jobs()[0])
            gaps = [gap for run in runs for line in run.timelines for gap in line.gaps]
            measured = {"first_token_ms": 1e3 * median([t.first_token for r in runs for t in r.timelines])}
            limits = {"first_token_ms": 1e3 * lines.first_token(asked)} if batch == 1 else {}
            if gaps:
                step = lines.step([tokens + 1 + output // 2] * batch)
                measured |= {
                    "inter_token_ms": 1e3 * median(gaps),
                    "inter_token_p99_ms": 1e3 * percentile(gaps, 0.99),
                    "tokens_per_s": median([_decode_rate(run) for run in runs]),
                }
                limits |= {"inter_token_ms": 1e3 * step, "tokens_per_s": batch / step}
            yield Row(f"{batch} x {tokens} tokens", measured, limits)


def _decode_rate(run: Run) -> float:
    """Tokens a second from when the last request got its first token until the first of them had its last."""
    begun = max(line.tokens[0][0] for line in run.timelines)
    ended = min(line.tokens[-1][0] for line in run.timelines)
    came = sum(count for line in run.timelines for now, count in line.tokens if begun < now <= ended)
    if came:
        return came / (ended - begun)
    # They were never all running: the whole run is what there is.
    return run.tokens / run.seconds


def throughput(session: Session, count: int, pictures: str, words: int, output: int) -> Iterator[Row]:
    """Many requests that are there from the beginning: with pictures, or of so many words without."""
    sizes = parse_pictures(pictures)

    def job() -> Job:
        sampling = params(output)
        return (
            session.requests.pictures(sizes, sampling) if sizes else session.requests.words(words, sampling)
        )

    runs = session.repeated(lambda: [job() for _ in range(count)])
    asked = session.size_up(job())
    least = session.model.rooflines.all_of([asked] * count)
    answers = [line.answer for run in runs for line in run.timelines]
    yield Row(
        f"{count} x {pictures if sizes else f'{words} tokens'}",
        {
            "first_token_ms": 1e3 * median([t.first_token for r in runs for t in r.timelines]),
            "answer_s": median(answers),
            "answer_p99_s": percentile(answers, 0.99),
            "tokens_per_s": median([run.tokens / run.seconds for run in runs]),
            "requests_per_s": median([count / run.seconds for run in runs]),
        },
        {"tokens_per_s": count * output / least, "requests_per_s": count / least},
    )


def pictures(session: Session, sizes: Sequence[str]) -> Iterator[Row]:
    """The first token after pictures that no cache knows."""
    for text in sizes:
        parsed = parse_pictures(text)
        yield _first_token(session, text, lambda: session.requests.pictures(parsed, params(1)))  # noqa: B023


def video(session: Session, frames: Sequence[int], size: str) -> Iterator[Row]:
    """The first token after a video whose frames are given (nothing is decoded)."""
    (one,) = parse_pictures(size)
    for count in frames:
        name = f"{count} frames of {size}"
        yield _first_token(session, name, lambda: session.requests.frames(count, one, params(1)))  # noqa: B023


def _first_token(session: Session, name: str, job: Callable[[], Job]) -> Row:
    runs = session.repeated(lambda: [job()])
    asked = session.size_up(job())
    times = [line.first_token for run in runs for line in run.timelines]
    return Row(
        f"{name}, {len(asked.patches)} slices, {asked.prompt} tokens",
        {"first_token_ms": 1e3 * median(times), "first_token_p99_ms": 1e3 * percentile(times, 0.99)},
        {"first_token_ms": 1e3 * session.model.rooflines.first_token(asked)},
    )


def beams(session: Session, widths: Sequence[int], picture: str, output: int) -> Iterator[Row]:
    """A step of a beam search after a picture, and of greedy beside it."""
    sizes = parse_pictures(picture)
    for width in widths:

        def job(width: int = width) -> Job:
            return session.requests.pictures(sizes, params(output, width))

        runs = session.repeated(lambda job=job: [job()])  # type: ignore[misc]
        asked = session.size_up(job())
        gaps = [gap for run in runs for line in run.timelines for gap in line.gaps]
        answer = median([line.answer for run in runs for line in run.timelines])
        yield Row(
            f"beam {width}" if width > 1 else "greedy",
            {
                "first_token_ms": 1e3 * median([t.first_token for r in runs for t in r.timelines]),
                "step_ms": 1e3 * median(gaps),
                "step_p99_ms": 1e3 * percentile(gaps, 0.99),
                "answer_s": answer,
            },
            {
                "first_token_ms": 1e3 * session.model.rooflines.first_token(asked),
                "step_ms": 1e3 * session.model.rooflines.mean_step(asked, width),
            },
        )
