"""Ctrl-C and an engine that dies. Runs last: it leaves no engine behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest

from huoyan import AsyncLLM, SamplingParams
from huoyan.errors import HuoyanError
from tests.contract.conftest import Pair
from tests.contract.test_answers import turn

pytestmark = pytest.mark.last
LONG = SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True)


def processes(pair: Pair) -> list[Any]:
    client: Any = pair.vllm_runtime.backend._client  # type: ignore[attr-defined]
    resources = client._engine.engine_core.resources
    return list(resources.engine_manager.processes)


def test_vllm_does_not_hear_ctrl_c(pair: Pair) -> None:
    """A terminal sends it to every process of the group, and vLLM's would end."""
    for process in processes(pair):
        os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    (output,) = pair.vllm.generate(
        {"prompt": turn("你好！")}, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False
    )
    assert len(output.outputs[0].token_ids) == 3


def test_every_waiter_hears_of_a_death(pair: Pair) -> None:
    """vLLM's engine process is killed while four wait for it: each gets the error, within seconds."""
    (process,) = processes(pair)
    llm = AsyncLLM.from_runtime(pair.vllm_runtime)

    async def wait() -> list[Any]:
        async def one(i: int) -> None:
            async for _ in llm.generate({"prompt": turn(f"你好 {i}！")}, LONG):
                started.set()

        started = asyncio.Event()
        tasks = [asyncio.ensure_future(one(i)) for i in range(4)]
        first = asyncio.ensure_future(started.wait())
        await asyncio.wait([first, *tasks], return_when=asyncio.FIRST_COMPLETED)
        assert started.is_set()
        os.kill(process.pid, signal.SIGKILL)
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)

    errors = asyncio.run(wait())
    assert len(errors) == 4
    for error in errors:
        assert isinstance(error, HuoyanError)
        assert "vLLM's engine has died" in str(error)
        assert "\n" not in str(error)
    with pytest.raises(HuoyanError, match="has died"):
        llm.check_health()
    with pytest.raises(HuoyanError, match="has died"):
        pair.vllm.generate({"prompt": "again"}, SamplingParams(max_tokens=1), use_tqdm=False)
