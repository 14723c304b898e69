"""`AsyncLLM` over a backend without a model: streams, cancellation, failure, shutdown."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

from huoyan.api.async_llm import AsyncLLM
from huoyan.api.sampling_params import SamplingParams
from huoyan.errors import HuoyanError, InputError
from tests.api.fakes import FakeBackend, FakeFrontend, WaitingBackend, fake_runtime

PARAMS = SamplingParams(max_tokens=1000)
LONG = " ".join(["w"] * 900)


def run(body: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(body(), 30))


def open_llm(backend: FakeBackend | None = None, **options: Any) -> AsyncLLM:
    return AsyncLLM.from_runtime(fake_runtime(backend, **options))


async def collect(llm: AsyncLLM, prompt: Any, **given: Any) -> list[str]:
    return [output.outputs[0].text async for output in llm.generate(prompt, PARAMS, **given)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_a_stream_grows_and_ends() -> None:
    async def body() -> None:
        llm = open_llm(FakeBackend(step_seconds=0.01))
        seen = await collect(llm, "a b c")
        assert seen[-1] == "a b c"
        assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
        assert len(seen) > 1
        llm.shutdown()

    run(body)


def test_requests_do_not_wait_for_a_backend_that_waits_itself() -> None:
    async def body() -> None:
        backend = WaitingBackend(together=3)
        llm = open_llm(backend)
        first = asyncio.create_task(collect(llm, "a b"))
        await until(lambda: len(backend.running) == 1)
        left = asyncio.create_task(collect(llm, "a b"))
        await until(lambda: len(backend.running) == 2)
        left.cancel()
        await until(lambda: len(backend.aborted) == 1)
        rest = asyncio.gather(collect(llm, "c d"), collect(llm, "e f"))
        assert (await first)[-1] == "a b"
        assert [seen[-1] for seen in await rest] == ["c d", "e f"]
        llm.shutdown()
        assert not backend.waited_in_vain

    run(body)


def test_shutdown_does_not_wait_for_a_backend_that_waits_itself() -> None:
    async def body() -> None:
        backend = WaitingBackend(together=3)
        llm = open_llm(backend)
        asked = asyncio.create_task(collect(llm, "a b"))
        await until(lambda: len(backend.running) == 1)
        llm.shutdown()
        with pytest.raises(HuoyanError):
            await asked
        assert not backend.waited_in_vain

    run(body)


def test_many_at_once_each_get_their_own() -> None:
    async def body() -> None:
        backend = FakeBackend(step_seconds=0.001)
        llm = open_llm(backend)
        ends = await asyncio.gather(*[collect(llm, f"request {i} " + "x " * (i % 17)) for i in range(120)])
        assert [end[-1] for end in ends] == [(f"request {i} " + "x " * (i % 17)).strip() for i in range(120)]
        assert backend.most_at_once > 10
        assert llm.num_requests == 0
        llm.shutdown()

    run(body)


def test_a_slow_reader_gets_the_newest_and_the_last() -> None:
    async def body() -> None:
        llm = open_llm()
        seen = []
        async for output in llm.generate(LONG, PARAMS):
            seen.append(output)
            await asyncio.sleep(0.02)
        assert len(seen) < 300
        assert seen[-1].finished
        assert seen[-1].outputs[0].text == LONG
        llm.shutdown()

    run(body)


@pytest.mark.parametrize("how", ["leave", "cancel", "close"])
def test_leaving_ends_the_request(how: str) -> None:
    async def body() -> None:
        backend = FakeBackend(step_seconds=0.002)
        llm = open_llm(backend)
        if how == "cancel":
            task = asyncio.ensure_future(collect(llm, LONG))
            await until(lambda: bool(backend.running))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            stream = llm.generate(LONG, PARAMS)
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: not backend.running)
        assert llm.num_requests == 0
        assert (await collect(llm, "still here"))[-1] == "still here"
        llm.shutdown()

    run(body)


def test_cancelling_during_preparation_ends_it_too() -> None:
    async def body() -> None:
        runtime = fake_runtime()
        frontend = runtime.frontend
        assert isinstance(frontend, FakeFrontend)
        frontend.gate.clear()
        llm = AsyncLLM.from_runtime(runtime)
        task = asyncio.ensure_future(collect(llm, "held up"))
        await until(lambda: llm.num_requests == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        frontend.gate.set()
        assert llm.num_requests == 0
        assert (await collect(llm, "next"))[-1] == "next"
        llm.shutdown()

    run(body)


def test_abort_gives_a_last_output() -> None:
    async def body() -> None:
        llm = open_llm(FakeBackend(step_seconds=0.002))
        last = None
        async for output in llm.generate(LONG, PARAMS, request_id="mine"):
            last = output
            await llm.abort("mine")
        assert last is not None
        assert last.finished
        assert last.outputs[0].finish_reason == "abort"
        await llm.abort("unknown")
        llm.shutdown()

    run(body)


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    async def body() -> None:
        backend = FakeBackend(step_seconds=0.002)
        llm = open_llm(backend)
        first = asyncio.ensure_future(collect(llm, "a b c d e f g h i j", request_id="same"))
        await until(lambda: bool(backend.running))
        with pytest.raises(InputError, match="in use"):
            await collect(llm, "b", request_id="same")
        assert (await first)[-1] == "a b c d e f g h i j"
        assert (await collect(llm, "b", request_id="same"))[-1] == "b"
        llm.shutdown()

    run(body)


@pytest.mark.parametrize("prompt", ["wrong", "refuse", 5, {"nothing": 1}])
def test_wrong_requests_raise_to_their_caller_alone(prompt: Any) -> None:
    async def body() -> None:
        llm = open_llm(FakeBackend(step_seconds=0.001))
        good = asyncio.ensure_future(collect(llm, "a b c d"))
        with pytest.raises(InputError):
            await collect(llm, prompt)
        assert (await good)[-1] == "a b c d"
        llm.shutdown()

    run(body)


def test_a_failing_engine_reaches_every_waiter() -> None:
    async def body() -> None:
        backend = FakeBackend(fail_after=5, step_seconds=0.005)
        llm = open_llm(backend, max_num_seqs=4)
        results = await asyncio.gather(*[collect(llm, LONG) for _ in range(40)], return_exceptions=True)
        assert {str(result) for result in results} == {"the engine failed (RuntimeError: the device is gone)"}
        assert all(isinstance(result, HuoyanError) for result in results)
        with pytest.raises(HuoyanError, match="device is gone"):
            llm.check_health()
        with pytest.raises(HuoyanError, match="device is gone"):
            await collect(llm, "later")
        # Those who wait are told first; then the engine's thread closes what it had.
        for _ in range(500):
            if backend.closed:
                break
            await asyncio.sleep(0.01)
        assert backend.closed
        llm.shutdown()

    run(body)


def test_shutdown_ends_the_waiting_and_the_thread() -> None:
    async def body() -> None:
        backend = FakeBackend(step_seconds=0.005)
        llm = open_llm(backend)
        llm.check_health()
        tasks = [asyncio.ensure_future(collect(llm, LONG)) for _ in range(5)]
        await until(lambda: len(backend.running) == 5)
        await asyncio.get_running_loop().run_in_executor(None, llm.shutdown)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all("shut down" in str(result) for result in results)
        assert backend.closed
        with pytest.raises(InputError, match="shut down"):
            await collect(llm, "later")
        llm.shutdown()

    run(body)
    assert not [t for t in threading.enumerate() if t.name == "huoyan-engine" and t.is_alive()]


def test_dropping_it_ends_the_thread() -> None:
    backend = FakeBackend()

    async def body() -> None:
        await collect(open_llm(backend), "a b")

    run(body)
    gc.collect()
    assert backend.closed


def test_ask_yields_pieces() -> None:
    async def body() -> None:
        llm = open_llm()
        pieces = [piece async for piece in llm.ask("a.jpg", "what is this?")]
        assert "".join(pieces) == "[a.jpg] what is this?"
        llm.shutdown()

    run(body)


def test_several_event_loops_share_one_engine() -> None:
    llm = open_llm(FakeBackend(step_seconds=0.001))
    results: dict[int, str] = {}

    def work(i: int) -> None:
        async def body() -> None:
            results[i] = (await collect(llm, f"loop {i} " + "x " * 10))[-1]

        asyncio.run(body())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == {i: (f"loop {i} " + "x " * 10).strip() for i in range(6)}
    llm.shutdown()
