"""A backend and a frontend without a model: the answer is the prompt's words, one a step."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from huoyan.api.options import EngineOptions
from huoyan.api.outputs import CompletionOutput, RequestMetrics, RequestOutput
from huoyan.api.prompts import ChatPrompt, Prompt
from huoyan.api.runtime import Runtime
from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.request import EngineRequest
from huoyan.errors import InputError
from huoyan.prompt.types import EncodedPrompt


class FakeFrontend:
    """`wrong` in a prompt is refused; `slow` takes a while to prepare; `bug` is an error nobody foresaw."""

    tokenizer: Any = None
    chat_template: Any = None

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def prepare(self, request_id: str, prompt: Prompt, params: SamplingParams) -> EngineRequest:
        self.gate.wait(20)
        text = chat_text(prompt) if isinstance(prompt, ChatPrompt) else prompt.text or ""
        self.prepared.append(text)
        if "slow" in text:
            time.sleep(0.2)
        if "wrong" in text:
            raise InputError(f"this prompt is wrong: {text}")
        if "bug" in text:
            raise ZeroDivisionError("a bug")
        return EngineRequest(request_id, EncodedPrompt(list(range(len(text.split()))), text=text), params)

    def default_sampling_params(self) -> SamplingParams:
        return SamplingParams(max_tokens=5, temperature=0.0)

    def asked_sampling(self) -> dict[str, Any]:
        return {"temperature": 0.0}


def chat_text(prompt: ChatPrompt) -> str:
    words: list[str] = []
    for message in prompt.messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        words += [str(part.get("text") or f"[{part.get('image') or part.get('video')}]") for part in parts]
    return " ".join(words)


class FakeBackend:
    """`fail_after` steps it breaks; `refuse` in a prompt is not taken; only one thread may be inside."""

    def __init__(self, fail_after: int | None = None, step_seconds: float = 0.0) -> None:
        self.running: dict[str, tuple[EngineRequest, CompletionOutput]] = {}
        self.ended: list[RequestOutput] = []
        self.aborted: list[str] = []
        self.most_at_once = 0
        self.steps = 0
        self.closed = False
        self.fail_after = fail_after
        self.step_seconds = step_seconds
        self._inside = threading.Lock()

    def add_request(self, request: EngineRequest) -> None:
        with _alone(self._inside):
            if "refuse" in (request.prompt.text or ""):
                raise InputError("the engine will not take this")
            self.running[request.request_id] = (request, CompletionOutput(0, "", []))
            self.most_at_once = max(self.most_at_once, len(self.running))

    def abort_request(self, request_id: str) -> None:
        with _alone(self._inside):
            self.aborted.append(request_id)
            found = self.running.pop(request_id, None)
            if found is not None:
                request, answer = found
                answer.finish_reason = "abort"
                self.ended.append(self._output(request, answer))

    def has_unfinished_requests(self) -> bool:
        return bool(self.running or self.ended)

    def step(self) -> list[RequestOutput]:
        with _alone(self._inside):
            self.steps += 1
            if self.fail_after is not None and self.steps > self.fail_after:
                raise RuntimeError("the device is gone")
            if self.step_seconds:
                time.sleep(self.step_seconds)
            outputs, self.ended = self.ended, []
            for request_id, (request, answer) in list(self.running.items()):
                words = (request.prompt.text or "").split()
                answer.token_ids.append(len(answer.token_ids))
                answer.text = " ".join(words[: len(answer.token_ids)])
                if len(answer.token_ids) >= len(words):
                    answer.finish_reason = "stop"
                elif len(answer.token_ids) >= (request.params.max_tokens or 10**9):
                    answer.finish_reason = "length"
                if answer.finish_reason:
                    del self.running[request_id]
                outputs.append(self._output(request, answer))
            return outputs

    def wake(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def _output(self, request: EngineRequest, answer: CompletionOutput) -> RequestOutput:
        copied = CompletionOutput(0, answer.text, list(answer.token_ids), finish_reason=answer.finish_reason)
        return RequestOutput(
            request.request_id,
            request.prompt.text,
            request.prompt.token_ids,
            [copied],
            answer.finish_reason is not None,
            metrics=RequestMetrics(request.arrival_time, first_token_time=time.monotonic()),
        )


class WaitingBackend(FakeBackend):
    """Computes elsewhere, as vLLM does: a step only waits until it does or `wake` is called. It computes as soon as it
    has `together` requests."""

    def __init__(self, together: int) -> None:
        super().__init__()
        self.together = together
        self.woken = threading.Event()
        self.waited_in_vain = False

    def wake(self) -> None:
        self.woken.set()

    def step(self) -> list[RequestOutput]:
        if self.together and len(self.running) < self.together and not self.ended:
            self.waited_in_vain |= not self.woken.wait(10)
            self.woken.clear()
            return []
        self.together = 0
        return super().step()


class _alone:
    """Fails where two threads are in the backend at once."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        assert self._lock.acquire(blocking=False), "two threads are in the backend"

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def fake_runtime(backend: FakeBackend | None = None, **options: Any) -> Runtime:
    return Runtime(backend or FakeBackend(), FakeFrontend(), Path("."), EngineOptions("fake", **options))
