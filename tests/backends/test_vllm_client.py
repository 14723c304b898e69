"""vLLM's failures as the backend sees them: refusals are one request's, a death is everybody's."""

from __future__ import annotations

import gc
import queue
import sys
import threading
import weakref
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from huoyan.api.sampling_params import SamplingParams
from huoyan.backends.vllm import client as client_module
from huoyan.backends.vllm.client import Client, EngineDied
from huoyan.engine.request import EngineRequest
from huoyan.errors import HuoyanError, InputError
from huoyan.prompt.types import EncodedPrompt

REQUEST = EngineRequest("a", EncodedPrompt([1, 2]), SamplingParams())


class EngineDeadError(Exception):
    """As vLLM calls it."""


class VLLMClientError(Exception): ...


class FakeEngine:
    """vLLM's `LLMEngine` with its engine in another process: `step` waits for `outputs_queue`."""

    def __init__(self) -> None:
        self.fails: Exception | None = None
        self.aborted: list[str] = []
        self.shut = 0
        resources = SimpleNamespace(engine_dead=False)
        self.engine_core = SimpleNamespace(
            resources=resources, outputs_queue=queue.Queue(), shutdown=self._shut_down
        )
        self.renderer = SimpleNamespace(shutdown=lambda: None)
        self.input_processor = SimpleNamespace(process_inputs=self._take)

    def _shut_down(self) -> None:
        self.shut += 1

    def _take(self, *_: Any, **__: Any) -> None:
        if self.fails is not None:
            raise self.fails

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def add_request(self, *_: Any) -> None:
        self._take()

    def abort_request(self, ids: list[str]) -> None:
        self._take()
        self.aborted += ids

    def has_unfinished_requests(self) -> bool:
        return True

    def step(self) -> list[Any]:
        self._take()
        found = self.engine_core.outputs_queue.get(timeout=20)
        if isinstance(found, Exception):
            raise found
        return [found]


class NoPictures:
    def prompt(self, request: EngineRequest, token_ids: list[int], *, send: bool) -> dict[str, Any]:
        return {"type": "token", "prompt_token_ids": token_ids}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    module = ModuleType("vllm.v1.engine.exceptions")
    module.EngineDeadError = EngineDeadError  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.v1.engine"].EngineCoreOutputs = list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.exceptions", module)
    monkeypatch.setattr(client_module, "WATCH_SECONDS", 0.01)
    return FakeEngine()


def opened(engine: FakeEngine) -> Client:
    return Client(engine, NoPictures())  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ValueError("too\n  long"), VLLMClientError("too long"), KeyError("x")])
def test_a_refusal_is_one_requests(engine: FakeEngine, error: Exception) -> None:
    client = opened(engine)
    engine.fails = error
    for call in (lambda: client.check(REQUEST, None), lambda: client.add("a/0", REQUEST, [1, 2], None)):
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in str(caught.value)
    engine.fails = None
    client.add("a/0", REQUEST, [1, 2], None)
    engine.engine_core.outputs_queue.put("an output")
    assert client.step() == ["an output"]
    client.close()


@pytest.mark.parametrize("where", ["check", "add", "abort", "step"])
def test_a_death_is_told_by_every_call(engine: FakeEngine, where: str) -> None:
    client = opened(engine)
    calls = {
        "check": lambda: client.check(REQUEST, None),
        "add": lambda: client.add("a/0", REQUEST, [1, 2], None),
        "abort": lambda: client.abort(["a/0"]),
        "step": client.step,
    }
    engine.fails = EngineDeadError()
    with pytest.raises(EngineDied, match="has died: what it printed says why"):
        calls[where]()
    engine.fails = None
    for name in ("check", "add", "step"):
        with pytest.raises(EngineDied):
            calls[name]()
    client.abort(["a/0"])
    assert not client.busy()
    assert engine.aborted == []
    client.close()


def test_what_fails_in_a_step_is_named(engine: FakeEngine) -> None:
    client = opened(engine)
    engine.fails = RuntimeError("out of\nmemory")
    with pytest.raises(EngineDied, match=r"\(RuntimeError: out of memory\)"):
        client.step()
    client.close()


def test_a_silent_death_wakes_who_waits(engine: FakeEngine) -> None:
    client = opened(engine)
    raised: list[Exception] = []

    def wait() -> None:
        try:
            client.step()
        except HuoyanError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    engine.engine_core.resources.engine_dead = True
    waiting.join(10)
    assert not waiting.is_alive()
    assert isinstance(raised[0], EngineDied)
    client.close()


def test_a_step_that_waits_is_woken_without_outputs(engine: FakeEngine) -> None:
    client = opened(engine)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(client.step()))
    waiting.start()
    client.wake()
    waiting.join(10)
    assert found == [[[]]]
    outputs = engine.engine_core.outputs_queue
    outputs.put("an output")
    client.wake()
    assert client.step() == ["an output"]
    assert outputs.empty()
    client.close()
    client.wake()
    assert outputs.empty()


def test_an_engine_in_this_process_needs_no_waking(engine: FakeEngine) -> None:
    del engine.engine_core.outputs_queue
    opened(engine).wake()


def test_closing_twice_and_afterwards(engine: FakeEngine) -> None:
    client = opened(engine)
    client.close()
    client.close()
    assert engine.shut == 1
    with pytest.raises(HuoyanError, match="closed"):
        client.step()
    with pytest.raises(HuoyanError, match="closed"):
        client.check(REQUEST, None)


def test_a_dropped_client_is_let_go(engine: FakeEngine) -> None:
    """The thread that watches must not keep the engine."""
    client = opened(engine)
    gone = weakref.ref(client)
    closed = client._closed
    del client
    gc.collect()
    assert gone() is None
    assert closed.is_set()
