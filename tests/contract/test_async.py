"""Streams that are left, requests that are aborted, many callers of one event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest

from huoyan import AsyncLLM, SamplingParams
from huoyan.api.outputs import RequestOutput
from tests.contract.compare import TOP, outputs_agree
from tests.contract.conftest import Pair, picture
from tests.contract.test_answers import PLACE, QUESTIONS, prompts, turn

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


class Lent:
    """A backend that somebody else closes."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def close(self) -> None: ...


@pytest.fixture
def served(pair: Pair) -> Iterator[AsyncLLM]:
    runtime = pair.vllm_runtime
    llm = AsyncLLM.from_runtime(dataclasses.replace(runtime, backend=Lent(runtime.backend)))
    yield llm
    llm.shutdown()
    # What was dropped on the way out was aborted in the engine's thread, or is aborted by the next step.
    assert not runtime.backend.has_unfinished_requests() or not runtime.backend._requests  # type: ignore[attr-defined]


async def last(stream: Any) -> RequestOutput:
    output = None
    async for output in stream:  # noqa: B007
        pass
    assert output is not None
    return output


def test_many_callers(pair: Pair, served: AsyncLLM, rng: random.Random) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=TOP)
    asked = prompts(rng)

    async def ask() -> list[RequestOutput]:
        return list(await asyncio.gather(*(last(served.generate(prompt, params)) for prompt in asked)))

    answered = asyncio.run(ask())
    native = pair.native.generate(asked, params, use_tqdm=False)
    for mine, theirs in zip(native, answered, strict=True):
        outputs_agree(mine, theirs, pair.checkpoint.tolerance)


@pytest.mark.parametrize("search", [False, True])
def test_an_abort_is_an_end(served: AsyncLLM, rng: random.Random, search: bool) -> None:
    """The aborted caller gets what there is, the others everything."""
    prompt = {"prompt": turn(f"{PLACE}\n{QUESTIONS[0]}"), "multi_modal_data": {"image": picture(rng)}}
    params = LONG.clone(use_beam_search=True, best_of=2) if search else LONG

    async def ask() -> tuple[RequestOutput, RequestOutput]:
        other = asyncio.ensure_future(last(served.generate(prompt, LONG.clone(max_tokens=30))))
        output = None
        async for output in served.generate(prompt, params, request_id="mine"):
            if len(output.outputs[0].token_ids) >= 5:
                await served.abort("mine")
        assert output is not None
        return output, await other

    mine, other = asyncio.run(ask())
    assert mine.finished
    assert mine.outputs[0].finish_reason == "abort"
    assert 5 <= len(mine.outputs[0].token_ids) < 400
    assert (len(other.outputs[0].token_ids), other.outputs[0].finish_reason) == (30, "length")


def test_a_stream_that_is_left(served: AsyncLLM, pair: Pair, rng: random.Random) -> None:
    """Leaving a stream, or cancelling its task, ends the request in vLLM."""
    prompt = {"prompt": turn(f"{PLACE}\n{QUESTIONS[0]}"), "multi_modal_data": {"image": picture(rng)}}

    async def leave() -> None:
        async for output in served.generate(prompt, LONG):
            if len(output.outputs[0].token_ids) > 3:
                break
        task = asyncio.ensure_future(last(served.generate(prompt, LONG)))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Long before 400 tokens are there, nothing runs any more.
        for _ in range(100):
            if not served.num_requests and not pair.vllm_runtime.backend.has_unfinished_requests():
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the request goes on")

    asyncio.run(leave())
    client = pair.vllm_runtime.backend._client  # type: ignore[attr-defined]
    assert not client.busy()


def test_a_closed_stream_of_the_blocking_api(pair: Pair, rng: random.Random) -> None:
    content = [{"type": "image", "image": picture(rng)}, {"type": "text", "text": "what?"}]
    stream = pair.vllm.stream([{"role": "user", "content": content}], LONG)
    for output in stream:
        if len(output.outputs[0].token_ids) > 2:
            break
    stream.close()  # type: ignore[attr-defined]
    assert not pair.vllm_runtime.backend._client.busy()  # type: ignore[attr-defined]
    (after,) = pair.vllm.generate(
        {"prompt": turn("你好！")}, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False
    )
    assert len(after.outputs[0].token_ids) == 3
