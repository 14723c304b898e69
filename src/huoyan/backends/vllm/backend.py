"""The backend: requests become runs of vLLM, and what vLLM gives for them becomes outputs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from huoyan.backends.vllm.answering import Answering, Samples
from huoyan.backends.vllm.client import Client, EngineDied
from huoyan.backends.vllm.logits import WholeVocabulary, changes_logits
from huoyan.backends.vllm.params import check_supported
from huoyan.backends.vllm.searching import Search
from huoyan.engine.answer import StopRules
from huoyan.engine.beam import BeamSearch
from huoyan.engine.output import request_output, shown_answers
from huoyan.engine.request import check_request, check_room
from huoyan.engine.structured import GrammarCompiler
from huoyan.errors import HuoyanError, InputError

if TYPE_CHECKING:
    from huoyan.api.outputs import RequestOutput
    from huoyan.engine.request import EngineRequest
    from huoyan.prompt.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Sizes that requests are checked against."""

    vocab_size: int
    query_num: int
    max_model_len: int
    max_num_seqs: int


class VllmBackend:
    """Implements `huoyan.backends.base.Backend` over vLLM's engine. One thread calls it."""

    def __init__(
        self,
        client: Client,
        limits: Limits,
        *,
        eos_token_id: int | None,
        stop_token_ids: Sequence[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        """`eos_token_id` and `stop_token_ids` are the checkpoint's."""
        self._client = client
        self.limits = limits
        self._eos_token_id = eos_token_id
        self._stop_token_ids = tuple(stop_token_ids)
        self._tokenizer = tokenizer
        stops = frozenset(self._stop_token_ids) | ({eos_token_id} if eos_token_id is not None else set())
        self._grammars = GrammarCompiler(tokenizer, limits.vocab_size, stops)
        self._requests: dict[str, Answering] = {}
        self._ended: list[RequestOutput] = []
        """Outputs of requests that ended outside of a step."""

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request. Raises InputError where it can never run."""
        if request.request_id in self._requests:
            raise InputError(f"a request {request.request_id!r} is running already: give it another id")
        limits, params = self.limits, request.params
        check_request(request, limits.vocab_size, limits.query_num)
        check_room(request, params.num_sequences, limits.max_model_len, limits.max_num_seqs)
        params.check_vocabulary(limits.vocab_size)
        check_supported(params)
        if params.structured_outputs is not None:
            # vLLM compiles it again; here a mistake is told in the native engine's words.
            self._grammars.compile(params.structured_outputs)
        answering = self._answering(request)
        try:
            answering.start()
        except HuoyanError:
            answering.stop()
            raise
        self._requests[request.request_id] = answering

    def abort_request(self, request_id: str) -> None:
        """End a request early; the next step returns it with finish_reason "abort"."""
        answering = self._requests.pop(request_id, None)
        if answering is not None:
            for answer in answering.live_answers:
                answer.finish("abort")
            shown = shown_answers(answering)
            answering.stop()
            self._ended.append(self._output(answering, shown))

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests or self._ended)

    def step(self) -> list[RequestOutput]:
        """Wait for vLLM's next step. Raises HuoyanError where vLLM has died; every request has then failed."""
        if self._ended:
            outputs, self._ended = self._ended, []
            return outputs
        if not self._client.busy():
            # After a death this raises; otherwise vLLM has forgotten requests that it never finished.
            self._client.check_alive()
            for answering in list(self._requests.values()):
                self._fail(answering, "vLLM ended the request without an answer")
            return self.step() if self._ended else []
        changed: dict[str, Answering] = {}
        for output in self._client.step():
            request_id = output.request_id.rpartition("/")[0]
            if request_id in self._requests and self._take(self._requests[request_id], output):
                changed[request_id] = self._requests[request_id]
        outputs, self._ended = self._ended, []
        for request_id, answering in changed.items():
            if request_id in self._requests:
                if answering.request.streamed or answering.finished:
                    outputs.append(self._output(answering, shown_answers(answering)))
                if answering.finished:
                    del self._requests[request_id]
        return outputs

    def wake(self) -> None:
        """Let a step that waits for vLLM return; any thread may call this."""
        self._client.wake()

    def close(self) -> None:
        """End vLLM. The backend cannot be used afterwards."""
        self._requests.clear()
        self._ended.clear()
        self._client.close()

    def _answering(self, request: EngineRequest) -> Answering:
        params, limits = request.params, self.limits
        rules = StopRules.of(params, self._eos_token_id, self._stop_token_ids)
        prompt_ids = request.prompt.token_ids
        room = limits.max_model_len - len(prompt_ids)
        if not params.use_beam_search:
            return Samples(request, self._client, rules, self._tokenizer, room)
        whole = None
        if changes_logits(params):
            wanted = params.structured_outputs
            grammar = None if wanted is None else self._grammars.compile(wanted)
            whole = WholeVocabulary(params, prompt_ids, limits.vocab_size, grammar)
        longest = max(len(prompt_ids) + (params.max_tokens or 0), limits.max_model_len)
        beams = BeamSearch(params, len(prompt_ids), longest, self._eos_token_id)
        return Search(request, self._client, rules, self._tokenizer, room, beams, whole)

    def _take(self, answering: Answering, output: Any) -> bool:
        reason = output.outputs[0].finish_reason
        if reason in ("abort", "error") and output.request_id in answering.runs:
            self._fail(answering, "vLLM could not go on with the request: what it printed says why")
            return False
        try:
            changed = answering.take(output.request_id, output)
        except EngineDied:
            raise
        except HuoyanError as error:
            self._fail(answering, str(error))
            return False
        except Exception as error:
            log.error("a step failed", exc_info=error)
            words = " ".join(str(error).split())
            self._fail(answering, f"internal error, please report it: {type(error).__name__}: {words}")
            return False
        if changed and answering.metrics.first_token_time is None:
            answering.metrics.first_token_time = monotonic()
        return changed

    def _fail(self, answering: Answering, message: str) -> None:
        del self._requests[answering.request.request_id]
        answering.stop()
        self._ended.append(request_output(answering, [], message))

    def _output(self, answering: Answering, shown: list[Any]) -> RequestOutput:
        output = request_output(answering, shown)
        if not answering.knows_logprobs:
            for completion in output.outputs:
                completion.cumulative_logprob = None
        return output
