"""vLLM's engine as the backend sees it, over a model that is a table: runs gain tokens in bursts, in any order."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from huoyan.engine.request import EngineRequest
from huoyan.errors import InputError


class Table:
    """A language model: the logits of the next token are drawn from a hash of the prefix."""

    def __init__(self, seed: int, vocab: int, warmth: float) -> None:
        self.seed, self.vocab, self.warmth = seed, vocab, warmth
        self.logits = lru_cache(maxsize=None)(self._logits)

    def _logits(self, prefix: tuple[int, ...]) -> list[float]:
        rng = random.Random(f"{self.seed} {prefix}")
        return [rng.gauss(0, 1) / self.warmth for _ in range(self.vocab)]

    def logprobs(self, prefix: tuple[int, ...]) -> list[float]:
        logits = self.logits(prefix)
        most = max(logits)
        total = most + math.log(sum(math.exp(x - most) for x in logits))
        return [x - total for x in logits]


@dataclass
class FakeRun:
    token_ids: list[int]
    params: Any
    made: list[int] = field(default_factory=list)


class FakeClient:
    """`refuse` in a run's id is not taken; `kill` makes the next step of the run with that id an error's."""

    def __init__(self, table: Table, seed: int) -> None:
        self.table = table
        self.rng = random.Random(seed)
        self.runs: dict[str, FakeRun] = {}
        self.started = 0
        self.kill: set[str] = set()
        self.closed = False

    def check(self, request: EngineRequest, params: Any) -> None:
        if "refuse" in request.request_id:
            raise InputError("vLLM refuses the request: no")

    def add(self, run_id: str, request: EngineRequest, token_ids: list[int], params: Any) -> None:
        assert run_id not in self.runs
        self.check(request, params)
        assert token_ids[: len(request.prompt.token_ids)] == request.prompt.token_ids
        if "half" in request.request_id and not run_id.endswith("/0"):
            raise InputError("vLLM refuses the request: half of it")
        self.runs[run_id] = FakeRun(list(token_ids), params)
        self.started += 1

    def abort(self, run_ids: list[str]) -> None:
        for run_id in run_ids:
            self.runs.pop(run_id, None)

    def busy(self) -> bool:
        return bool(self.runs)

    def check_alive(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def step(self) -> list[Any]:
        """Some of the runs go on, by one token or two."""
        ids = list(self.runs)
        self.rng.shuffle(ids)
        chosen = ids[: self.rng.randint(1, len(ids))]
        return [self._go_on(run_id, self.rng.choice([1, 1, 1, 2])) for run_id in chosen]

    def _go_on(self, run_id: str, count: int) -> Any:
        run = self.runs[run_id]
        if run_id in self.kill:
            self.runs.pop(run_id, None)
            return _output(run_id, [], None, "error")
        new: list[int] = []
        reports: list[Any] = []
        reason = None
        while len(new) < count and reason is None:
            logprobs = self.table.logprobs((*run.token_ids, *run.made))
            token = max(range(len(logprobs)), key=lambda t: (logprobs[t], -t))
            run.made.append(token)
            new.append(token)
            reports.append(self._report(token, logprobs, run.params))
            if token in run.params.stop_token_ids:
                reason = "stop"
            elif len(run.made) >= run.params.max_tokens:
                reason = "length"
        if reason is not None:
            self.runs.pop(run_id, None)
        wanted = run.params.logprobs is not None
        found = reports[0] if wanted and run.params.logprobs == -1 else reports if wanted else None
        return _output(run_id, new, found, reason)

    def _report(self, token: int, logprobs: list[float], params: Any) -> Any:
        if params.logprobs is None:
            return None
        ranked = sorted(range(len(logprobs)), key=lambda t: (-logprobs[t], t))
        if params.logprobs == -1:
            # vLLM's FlatLogprobs: the chosen token first, and again among the others.
            ids = [token, *ranked]
            return SimpleNamespace(token_ids=ids, logprobs=[logprobs[t] for t in ids])
        ids = [token, *ranked[: params.logprobs]]
        return {t: SimpleNamespace(logprob=logprobs[t], rank=ranked.index(t) + 1) for t in ids}


def _output(run_id: str, token_ids: list[int], logprobs: Any, reason: str | None) -> Any:
    completion = SimpleNamespace(token_ids=token_ids, logprobs=logprobs, finish_reason=reason)
    return SimpleNamespace(request_id=run_id, outputs=[completion], num_cached_tokens=0, prompt_logprobs=None)
