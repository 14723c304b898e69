"""A request while vLLM runs it, and its simple form: answers that do not depend on each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from huoyan.api.outputs import Logprob, RequestMetrics
from huoyan.backends.vllm.params import sample_params
from huoyan.engine.answer import Answer, AnswerText, ChosenToken, StopRules

if TYPE_CHECKING:
    from huoyan.api.outputs import TokenLogprobs
    from huoyan.backends.vllm.client import Client
    from huoyan.engine.beam import BeamSearch
    from huoyan.engine.request import EngineRequest
    from huoyan.prompt.tokenizer import Tokenizer


class Answering(ABC):
    """One request. It is what `huoyan.engine.output` makes outputs from (`Answered`).

    vLLM knows of its sequences only, called runs here; `runs` are the ids of those that go on.
    """

    def __init__(self, request: EngineRequest, client: Client, room: int) -> None:
        """`room`: tokens that an answer may have in the context."""
        self.request = request
        self.params = request.params
        self.width = request.params.num_sequences
        self.answers: list[Answer] = []
        self.beams: BeamSearch | None = None
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.warnings: list[str] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.runs: set[str] = set()
        self.max_tokens = room if self.params.max_tokens is None else min(room, self.params.max_tokens)
        self._client = client
        self._stopped = False

    @property
    @abstractmethod
    def live_answers(self) -> list[Answer]:
        """Those that still grow."""

    @property
    def finished(self) -> bool:
        return self._stopped or not self.live_answers

    @property
    @abstractmethod
    def knows_logprobs(self) -> bool:
        """Whether vLLM reports what the chosen tokens cost; it is asked only where that is needed."""

    @abstractmethod
    def start(self) -> None:
        """Hand the first runs to vLLM. Raises InputError; then nothing of it runs."""

    @abstractmethod
    def take(self, run_id: str, output: Any) -> bool:
        """Take what vLLM gives for a run; whether the answers have changed."""

    def stop(self) -> None:
        """End every run, and with them the request."""
        self._stopped = True
        runs, self.runs = list(self.runs), set()
        self._client.abort(runs)

    def read_prompt(self, output: Any) -> None:
        """What the first output of a request's first run says about the prompt."""
        self.metrics.cached_prompt_tokens = output.num_cached_tokens or 0
        if output.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = [_entries(entry) if entry else None for entry in output.prompt_logprobs]

    def answer(self, rules: StopRules, tokenizer: Tokenizer | None) -> Answer:
        """An empty one."""
        words = AnswerText.of(self.params, tokenizer) if tokenizer and self.params.detokenize else None
        return Answer(rules, words, self.max_tokens)


class Samples(Answering):
    """`best_of` answers, each a run of its own; vLLM shares what they have in common by its prefix cache."""

    def __init__(
        self, request: EngineRequest, client: Client, rules: StopRules, tokenizer: Tokenizer | None, room: int
    ) -> None:
        super().__init__(request, client, room)
        self._rules = rules
        self.answers = [self.answer(rules, tokenizer) for _ in range(self.width)]
        self._by_run = {f"{request.request_id}/{i}": i for i in range(self.width)}

    @property
    def live_answers(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.finish_reason is None]

    @property
    def ranks(self) -> bool:
        """Whether answers are left out, which takes their log-probabilities."""
        return self.width > self.params.n

    @property
    def knows_logprobs(self) -> bool:
        return self.params.logprobs is not None or self.ranks

    def start(self) -> None:
        logprobs = self.params.logprobs if self.params.logprobs is not None else 0 if self.ranks else None
        made = [
            (
                run_id,
                sample_params(self.params, self._rules, self.max_tokens, i, logprobs, self.request.streamed),
            )
            for run_id, i in self._by_run.items()
        ]
        if self.request.pictures:
            # `add` would tell vLLM's cache of pictures that then are not sent; without any it checks by itself.
            self._client.check(self.request, made[0][1])
        for run_id, params in made:
            self._client.add(run_id, self.request, self.request.prompt.token_ids, params)
            self.runs.add(run_id)

    def take(self, run_id: str, output: Any) -> bool:
        index = self._by_run[run_id]
        if index == 0:
            self.read_prompt(output)
        if run_id not in self.runs:
            return False
        answer = self.answers[index]
        (completion,) = output.outputs
        for i, token_id in enumerate(completion.token_ids):
            step = completion.logprobs[i] if completion.logprobs else None
            if answer.append(_chosen(token_id, step, self.params.logprobs is not None)):
                break
        if completion.finish_reason is not None and answer.finish_reason is None:
            # vLLM's context has come to its end.
            answer.finish("length")
        if answer.finish_reason is not None:
            self.runs.discard(run_id)
            if completion.finish_reason is None:
                self._client.abort([run_id])
        return True


def _chosen(token_id: int, step: Any, reported: bool) -> ChosenToken:
    if step is None:
        return ChosenToken(token_id)
    return ChosenToken(token_id, step[token_id].logprob, _entries(step) if reported else None)


def _entries(step: Any) -> TokenLogprobs:
    """vLLM's entries of one position as ours: the token itself, then the likeliest ones."""
    return {int(token): Logprob(entry.logprob, entry.rank) for token, entry in step.items()}
