"""`LLM` over a backend without a model: order, errors, interrupts, what is refused."""

from __future__ import annotations

import _thread
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from huoyan.api.ask import ask_messages
from huoyan.api.driver import Job
from huoyan.api.llm import LLM
from huoyan.api.prompts import CompletionPrompt
from huoyan.api.sampling_params import SamplingParams
from huoyan.engine.request import EngineRequest
from huoyan.errors import HuoyanError, InputError, UnsupportedError
from tests.api.fakes import FakeBackend, FakeFrontend, WaitingBackend, fake_runtime


def open_llm(backend: FakeBackend | None = None, **options: Any) -> LLM:
    return LLM.from_runtime(fake_runtime(backend, **options))


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


PARAMS = SamplingParams(max_tokens=100)


def test_one_prompt_gives_a_list_of_one() -> None:
    assert texts(open_llm().generate("a b c", PARAMS)) == ["a b c"]
    assert texts(open_llm().generate({"prompt": "a b"}, PARAMS)) == ["a b"]


def test_one_request_is_prepared_in_the_calling_thread_and_several_are_not() -> None:
    llm = open_llm()
    frontend = llm._runtime.frontend
    threads = []
    prepare = frontend.prepare

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return prepare(*arguments)

    frontend.prepare = noted  # type: ignore[method-assign]
    llm.generate("a", PARAMS)
    assert threads.pop() is threading.main_thread()
    llm.generate(["a", "b"], PARAMS)
    assert threading.main_thread() not in threads


def test_order_is_kept_whatever_takes_long(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [
        " ".join([f"p{i}", *(["slow"] if rng.random() < 0.1 else []), *["w"] * rng.randrange(30)])
        for i in range(100)
    ]
    backend = FakeBackend()
    assert texts(open_llm(backend, max_num_seqs=4).generate(prompts, PARAMS)) == prompts
    assert backend.most_at_once <= 4 + 16
    assert not backend.running


def test_a_list_of_params_goes_with_its_prompts() -> None:
    params = [SamplingParams(max_tokens=n) for n in (1, 2, 3)]
    assert texts(open_llm().generate(["a b c"] * 3, params)) == ["a", "a b", "a b c"]


def test_without_params_the_checkpoints_defaults_hold() -> None:
    assert texts(open_llm().generate(["a b c d e f g"])) == ["a b c d e"]


def test_wrong_prompts_among_others_become_errors() -> None:
    prompts: list[Any] = ["a", "wrong one", {"prompt": "x", "nonsense": 1}, "refuse this", "b c", 3.5]
    outputs = open_llm().generate(prompts, PARAMS)
    assert [bool(output.error) for output in outputs] == [False, True, True, True, False, True]
    assert "wrong one" in (outputs[1].error or "")
    assert "nonsense" in (outputs[2].error or "")
    assert all(output.finished for output in outputs)
    assert texts([outputs[0], outputs[4]]) == ["a", "b c"]
    assert outputs[1].outputs == []


@pytest.mark.parametrize("prompt", ["wrong", "refuse", {"prompt": None}, {}])
def test_a_single_wrong_prompt_raises(prompt: Any) -> None:
    with pytest.raises(InputError):
        open_llm().generate(prompt, PARAMS)
    with pytest.raises(InputError):
        open_llm().generate([prompt], PARAMS)
    assert open_llm().generate([prompt], PARAMS, raise_on_error=False)[0].error


def test_raising_leaves_nothing_behind() -> None:
    backend = FakeBackend()
    llm = open_llm(backend)
    with pytest.raises(InputError):
        llm.generate(["a b c"] * 5 + ["wrong slow"], PARAMS, raise_on_error=True)
    assert not backend.running
    assert texts(llm.generate("still here", PARAMS)) == ["still here"]


def test_a_bug_in_one_prompt_does_not_cost_the_others() -> None:
    outputs = open_llm().generate(["a", "bug", "b"], PARAMS)
    assert [output.error is None for output in outputs] == [True, False, True]
    assert "ZeroDivisionError" in (outputs[1].error or "")


def test_token_ids_in_every_form() -> None:
    llm = open_llm()
    for prompts in ([1, 2, 3], np.array([1, 2, 3]), {"prompt_token_ids": [1, 2]}, [[1, 2]], [[1], [2]]):
        assert all(output.error is None for output in llm.generate(prompts, PARAMS))
    assert len(llm.generate(prompt_token_ids=[[1], [2, 3]], sampling_params=PARAMS)) == 2
    with pytest.raises(InputError, match="not both"):
        llm.generate("a", PARAMS, prompt_token_ids=[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(), "needs prompts"),
        (lambda llm: llm.generate(["a", "b"], [PARAMS]), "2 prompts and 1"),
        (lambda llm: llm.generate("a", {"max_tokens": 3}), "must be SamplingParams"),
        (lambda llm: llm.generate("a", nonsense=1), "no argument 'nonsense'"),
        (lambda llm: llm.generate(5), "prompts must be"),
        (lambda llm: llm.chat({"role": "user", "content": "a"}), "put the dict in a list"),
        (lambda llm: llm.chat([]), "empty"),
        (lambda llm: llm.chat("hello"), "list of"),
        (lambda llm: llm.chat([{"role": "user", "content": "a"}], continue_final_message=True), "goes on"),
        (lambda llm: llm.ask(None, "  "), "question is empty"),
        (lambda llm: llm.ask(None, "hello", max_tokns=3), "max_tokns"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(open_llm())


def test_what_would_change_the_result_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="merge the adapter"):
        open_llm().generate("a", PARAMS, lora_request=object())
    with pytest.raises(UnsupportedError, match="structured_outputs"):
        open_llm().generate("a", PARAMS, guided_options_request=object())
    assert texts(open_llm().generate("a", PARAMS, priority=[0])) == ["a"]


def test_chat_takes_one_conversation_or_several() -> None:
    llm = open_llm()
    one = [{"role": "user", "content": "hello there"}]
    two = [{"role": "user", "content": [{"type": "text", "text": "and you"}]}]
    assert texts(llm.chat(one, PARAMS)) == ["hello there"]
    assert texts(llm.chat([one, two], PARAMS)) == ["hello there", "and you"]


def test_ask_puts_pictures_before_the_question() -> None:
    assert open_llm().ask(["a.jpg", "b.jpg"], "what changed?") == "[a.jpg] [b.jpg] what changed?"
    assert open_llm().ask("a.jpg", "what is it?", max_tokens=2) == "[a.jpg] what"
    messages = ask_messages(["a.MP4", Path("b.mov"), "c.png", "https://x/d.webm?e=f", "mp4"], "?")
    kinds = [part["type"] for part in messages[0]["content"]]
    assert kinds == ["video", "video", "image", "video", "image", "text"]
    assert open_llm().ask(None, "hello", system="be brief") == "be brief hello"


def test_stream_gives_every_step_and_may_be_left() -> None:
    backend = FakeBackend()
    llm = open_llm(backend)
    messages = [{"role": "user", "content": "a b c d"}]
    seen = [output.outputs[0].text for output in llm.stream(messages, PARAMS)]
    assert seen == ["a", "a b", "a b c", "a b c d"]
    stream = llm.stream(messages, PARAMS)
    next(stream)
    stream.close()
    assert not backend.running
    assert texts(llm.generate("next", PARAMS)) == ["next"]


class Interrupting(FakeBackend):
    """Ctrl-C arrives in the middle of a step."""

    at = 3
    finished_steps = 0

    def step(self) -> list[Any]:
        if self.steps + 1 == self.at:
            _thread.interrupt_main()
        outputs = super().step()
        self.finished_steps += 1
        return outputs


def test_an_interrupt_ends_the_call_and_leaves_the_llm_usable() -> None:
    backend = Interrupting()
    llm = open_llm(backend)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a b c d e f"] * 3, PARAMS)
    assert backend.finished_steps == backend.steps == 3
    assert not backend.running
    assert texts(llm.generate(["and on"], PARAMS)) == ["and on"]


def test_requests_do_not_wait_for_a_backend_that_waits_itself() -> None:
    """Those that are prepared later are handed over at once, not after the step that is under way elsewhere."""
    backend = WaitingBackend(together=12)
    prompts = [f"{i} a b" + " slow" * (i == 7) for i in range(12)]
    assert texts(open_llm(backend).generate(prompts, PARAMS)) == prompts
    assert not backend.waited_in_vain


def test_a_failing_backend_is_heard_and_leaves_nothing() -> None:
    backend = FakeBackend(fail_after=2)
    with pytest.raises(RuntimeError, match="device is gone"):
        open_llm(backend).generate(["a b c d"] * 3, PARAMS)
    assert not backend.running


def test_memory_running_out_is_one_line() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    class Small(FakeBackend):
        def step(self) -> list[Any]:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate…")

    with pytest.raises(HuoyanError, match="lower gpu_memory_utilization"):
        open_llm(Small()).generate("a", PARAMS)


def test_threads_take_turns() -> None:
    llm = open_llm(FakeBackend(step_seconds=0.001))
    results: dict[int, list[str]] = {}

    def work(i: int) -> None:
        results[i] = texts(llm.generate([f"t{i} a b", f"t{i} c"], PARAMS))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [f"t{i} a b", f"t{i} c"] for i in range(8)}


def test_no_more_is_prepared_than_there_is_room_for() -> None:
    runtime = fake_runtime(max_num_seqs=2)
    llm = LLM.from_runtime(runtime)
    frontend = runtime.frontend
    assert isinstance(frontend, FakeFrontend)
    stream = llm.run_jobs(_endless())
    for _ in range(50):
        next(stream)
    assert len(frontend.prepared) < 50 + 2 + 2 * 16
    stream.close()


def _endless() -> Any:
    from huoyan.api.driver import Job
    from huoyan.api.prompts import CompletionPrompt

    i = 0
    while True:
        yield Job(str(i), CompletionPrompt(text="one"), PARAMS)
        i += 1


def test_closing_frees_the_backend_and_says_so() -> None:
    backend = FakeBackend()
    with open_llm(backend) as llm:
        llm.generate("a", PARAMS)
    assert backend.closed
    with pytest.raises(InputError, match="closed"):
        llm.generate("a", PARAMS)


def test_use_tqdm_may_be_a_class() -> None:
    calls: list[tuple[str, Any]] = []

    class Bar:
        def __init__(self, **given: Any) -> None:
            calls.append(("open", given["total"]))

        def update(self, n: int) -> None:
            calls.append(("update", n))

        def close(self) -> None:
            calls.append(("close", None))

    open_llm().generate(["a b", "c"], PARAMS, use_tqdm=Bar)
    assert calls == [("open", 2), ("update", 1), ("update", 1), ("close", None)]


def test_nothing_is_drawn_into_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    open_llm().generate(["a b", "c"], PARAMS, use_tqdm=True)
    assert capfd.readouterr() == ("", "")


class Noting(FakeBackend):
    """Which of its requests count together."""

    def __init__(self) -> None:
        super().__init__()
        self.in_bulk: list[bool] = []

    def add_request(self, request: EngineRequest) -> None:
        self.in_bulk.append(request.in_bulk)
        super().add_request(request)


def test_calls_of_few_requests_count_together() -> None:
    """What fits the seats may wait for each other; more may not, nor what is yielded one by one."""
    backend = Noting()
    llm = open_llm(backend, max_num_seqs=3)
    llm.generate(["a", "b", "c"], PARAMS)
    assert backend.in_bulk == [True] * 3
    llm.generate(["a", "b", "c", "d"], PARAMS)
    assert backend.in_bulk[3:] == [False] * 4
    assert list(llm.run_jobs([Job("x", CompletionPrompt("a"), PARAMS)], streamed=False))
    assert list(llm.stream([{"role": "user", "content": "a"}], PARAMS))
    assert backend.in_bulk[7:] == [False] * 2
