"""`AsyncLLM`: a model in a thread of its own, answering many callers of an event loop at once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from huoyan.api.driver import AHEAD, default_workers
from huoyan.api.engine_thread import Batch, EngineThread
from huoyan.api.llm import chat_options
from huoyan.api.options import parse_options
from huoyan.api.outputs import RequestOutput
from huoyan.api.prompts import ChatPrompt, Prompt, parse_prompt
from huoyan.errors import HuoyanError

if TYPE_CHECKING:
    import os

    from huoyan.api.hf_tokenizer import HFTokenizer
    from huoyan.api.runtime import Runtime
    from huoyan.api.sampling_params import SamplingParams


class AsyncLLM:
    """The same model and options as `LLM`, for an event loop: streaming, cancellation, many requests at once.

        llm = AsyncLLM("openbmb/MiniCPM-V-2_6")
        async for output in llm.chat(messages, SamplingParams(max_tokens=256)):
            print(output.outputs[0].text)

    Each output holds everything up to now; where the caller is slower than the engine, some are skipped,
    never the last. Leaving the loop, or cancelling the task, ends the request and frees what it held.

    It may be used from several event loops. `shutdown` ends it; so does dropping it.
    """

    def __init__(self, model: str | os.PathLike[str], tokenizer: str | None = None, **options: Any) -> None:
        from huoyan.api.loading import load_runtime

        self._start(load_runtime(parse_options(model, {"tokenizer": tokenizer, **options})))

    @classmethod
    def from_runtime(cls, runtime: Runtime) -> AsyncLLM:
        """An `AsyncLLM` over a model that is already loaded."""
        llm = cls.__new__(cls)
        llm._start(runtime)
        return llm

    def _start(self, runtime: Runtime) -> None:
        self._frontend = runtime.frontend
        self.options = runtime.options
        self._pool = ThreadPoolExecutor(default_workers(), thread_name_prefix="huoyan-prepare")
        self._engine = EngineThread(runtime.backend)
        # Dropped without `shutdown`, or at the interpreter's end: the engine's thread must not outlive it.
        weakref.finalize(self, self._engine.close)
        self._counter = itertools.count()
        self._hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Hub] = weakref.WeakKeyDictionary()

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Answer one prompt (text, token ids, or a dict as for `LLM.generate`), output by output.

        Raises:
            InputError: the prompt or its parameters are wrong.
            HuoyanError: the engine failed, or was shut down.
        """
        async for output in self._run(parse_prompt(prompt), sampling_params, request_id):
            yield output

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one conversation, output by output; messages and options as for `LLM.chat`."""
        prompt = ChatPrompt(messages=messages, **chat_options(**options))
        async for output in self._run(prompt, sampling_params, request_id):
            yield output

    async def ask(
        self, pictures: Any, question: str, *, system: str | None = None, **params: Any
    ) -> AsyncIterator[str]:
        """Ask about pictures and yield the answer piece by piece; arguments as for `LLM.ask`."""
        from huoyan.api.ask import ask_messages, ask_params

        shown = 0
        async for output in self.chat(ask_messages(pictures, question, system), ask_params(params)):
            text = output.outputs[0].text if output.outputs else ""
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)

    async def abort(self, request_id: str) -> None:
        """End a request early: its caller gets one last output with finish_reason "abort"."""
        self._engine.abort(request_id)

    def get_tokenizer(self) -> HFTokenizer:
        """As `LLM.get_tokenizer`."""
        from huoyan.api.hf_tokenizer import HFTokenizer

        return HFTokenizer(self._frontend.tokenizer, self._frontend.chat_template)

    def get_default_sampling_params(self) -> SamplingParams:
        """As `LLM.get_default_sampling_params`."""
        return self._frontend.default_sampling_params()

    @property
    def num_requests(self) -> int:
        """Requests in preparation, queued or running."""
        return self._engine.num_requests

    def check_health(self) -> None:
        """Raises HuoyanError where the engine has failed."""
        if self._engine.failure is not None:
            raise self._engine.failure

    def shutdown(self) -> None:
        """End every request with an error and free the device's memory. Safe to call twice."""
        self._engine.close()
        self._pool.shutdown(wait=False)

    async def _run(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str | None
    ) -> AsyncIterator[RequestOutput]:
        hub = self._hub()
        identity = f"async-{next(self._counter)}" if request_id is None else request_id
        if params is None:
            params = self.get_default_sampling_params()
        mailbox = hub.open(identity, self._engine)
        try:
            async with hub.room:
                self._engine.check_open()
                request = await hub.loop.run_in_executor(
                    self._pool, self._frontend.prepare, identity, prompt, params
                )
                self._engine.submit(request)
                while True:
                    output = await mailbox.next()
                    if output.error is not None:
                        raise HuoyanError(output.error)
                    yield output
                    if output.finished:
                        return
        finally:
            hub.mailboxes.pop(identity, None)
            self._engine.release(identity)

    def _hub(self) -> _Hub:
        loop = asyncio.get_running_loop()
        hub = self._hubs.get(loop)
        if hub is None:
            hub = self._hubs[loop] = _Hub(loop, self.options.max_num_seqs + AHEAD)
        return hub


class _Mailbox:
    """The newest output of one request. Outputs are cumulative, so an unread one may be replaced."""

    def __init__(self) -> None:
        self._latest: RequestOutput | None = None
        self._error: HuoyanError | None = None
        self._arrived = asyncio.Event()

    def put(self, result: RequestOutput | HuoyanError) -> None:
        if isinstance(result, HuoyanError):
            self._error = result
        else:
            self._latest = result
        self._arrived.set()

    async def next(self) -> RequestOutput:
        await self._arrived.wait()
        self._arrived.clear()
        if self._error is not None:
            raise self._error
        assert self._latest is not None
        return self._latest


class _Hub:
    """What one event loop shares: the mailboxes of its requests, and room for so many prepared ones."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self.loop = loop
        self.room = asyncio.Semaphore(limit)
        self.mailboxes: dict[str, _Mailbox] = {}

    def open(self, request_id: str, engine: EngineThread) -> _Mailbox:
        engine.reserve(request_id, self.deliver)
        mailbox = self.mailboxes[request_id] = _Mailbox()
        return mailbox

    def deliver(self, batch: Batch) -> None:
        if not self.loop.is_closed():
            # The loop may close at any moment; then nobody waits for this any more.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._sort, batch)

    def _sort(self, batch: Batch) -> None:
        for request_id, result in batch.items():
            mailbox = self.mailboxes.get(request_id)
            if mailbox is not None:
                mailbox.put(result)
