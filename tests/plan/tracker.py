"""What torch's allocator really had at its fullest, in all and in each moment of a step.

Torch's profiler reports every allocation and release of its CPU allocator, those inside operators too. The KV cache
and the pixels of pictures are numpy's on a CPU and not in these books.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from huoyan.engine.engine import Engine

MOMENTS = ("encoder", "decoder", "logits", "choice", "prompt_logprobs")


@dataclass
class Peaks:
    """Bytes above what there was at the beginning."""

    total: int
    moments: dict[str, int] = field(default_factory=dict)
    """Of each moment, above what there was when it began."""


def watched(engine: Engine, run: Callable[[], Any]) -> tuple[Any, Peaks]:
    """Run, and say what it took."""
    _mark(engine.runner, "encode", "encoder")
    _mark(engine.model, "decoder", "decoder")
    _mark(engine.model, "head", "logits")
    _mark(engine._chooser, "choose", "choice")
    _mark(engine, "_read_prompts", "prompt_logprobs")
    # What earlier runs have left must not be released in this one.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    spans = sorted(
        (e.start_ns(), e.end_ns(), e.name().removeprefix("moment "))
        for e in events
        if e.name().startswith("moment ")
    )
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert changes, "the profiler saw no memory"
    peaks = Peaks(0, dict.fromkeys(MOMENTS, 0))
    now = at = 0
    inside = [(begin, end) for begin, end, name in spans if name == "prompt_logprobs"]
    for begin, end, name in spans:
        if name == "logits" and any(first < begin < last for first, last in inside):
            continue
        while at < len(changes) and changes[at][0] < begin:
            now += changes[at][1]
            peaks.total = max(peaks.total, now)
            at += 1
        before, ahead, here = now, at, now
        while ahead < len(changes) and changes[ahead][0] <= end:
            here += changes[ahead][1]
            peaks.moments[name] = max(peaks.moments[name], here - before)
            ahead += 1
    for _, change in changes[at:]:
        now += change
        peaks.total = max(peaks.total, now)
    return result, peaks


def _mark(owner: Any, name: str, moment: str) -> None:
    inner = getattr(owner, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"moment {moment}"):
            return inner(*args, **kwargs)

    owner.__dict__[name] = marked


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes that a call had at its fullest."""
    # What earlier runs have left must not be released in this one.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        most = max(most, now)
    del result
    return most
