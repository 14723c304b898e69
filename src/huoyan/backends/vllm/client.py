"""vLLM's engine as the backend uses it: add, abort, step, with its failures in one line."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from huoyan.backends.vllm.messages import is_refusal, one_line
from huoyan.errors import HuoyanError, InputError

if TYPE_CHECKING:
    from huoyan.backends.vllm.pictures import PictureInputs
    from huoyan.engine.request import EngineRequest

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
"""How often is looked whether vLLM's engine process still lives."""


class EngineDied(HuoyanError):
    """vLLM's engine has ended and does not come back."""


class Client:
    """One `vllm.v1.engine.llm_engine.LLMEngine`, in this process or (vLLM's default) in one of its own."""

    def __init__(self, engine: Any, pictures: PictureInputs) -> None:
        self._engine = engine
        self._pictures = pictures
        self._closed = threading.Event()
        self._failure: EngineDied | None = None
        core = engine.engine_core
        self._outputs: Any = None
        """Where vLLM's engine process leaves its outputs; None where the engine is in this process."""
        if hasattr(core, "outputs_queue") and hasattr(core, "resources"):
            self._outputs = core.outputs_queue
            # It must not keep alive what it watches: a model that is dropped takes its processes along.
            watched = (self._closed, core.resources, core.outputs_queue)
            threading.Thread(target=_watch, args=watched, name="huoyan-vllm-watch", daemon=True).start()
            weakref.finalize(self, self._closed.set)

    def check(self, request: EngineRequest, params: Any) -> None:
        """Raise InputError where vLLM would refuse the request; nothing is sent."""
        prompt = self._pictures.prompt(request, request.prompt.token_ids, send=False)
        with self._taking():
            self._engine.input_processor.process_inputs(
                "check", prompt, params, supported_tasks=self._engine.get_supported_tasks()
            )

    def add(self, run_id: str, request: EngineRequest, token_ids: list[int], params: Any) -> None:
        """Start a sequence whose prompt is `token_ids`, the request's own first."""
        with self._taking():
            prompt = self._pictures.prompt(request, token_ids, send=True)
            self._engine.add_request(run_id, prompt, params)

    def abort(self, run_ids: list[str]) -> None:
        """End runs; those that are unknown or at their end are ignored."""
        if run_ids and self._failure is None:
            try:
                self._engine.abort_request(run_ids)
            except Exception as error:
                raise self._died(error) from error

    def busy(self) -> bool:
        """Whether vLLM has anything to do."""
        return self._failure is None and bool(self._engine.has_unfinished_requests())

    def step(self) -> list[Any]:
        """vLLM's outputs of its next step. Raises EngineDied."""
        self.check_alive()
        try:
            return list(self._engine.step())
        except Exception as error:
            raise self._died(error) from error

    def wake(self) -> None:
        """Let a `step` that waits return without outputs; any thread may call this.

        What comes while it waits would otherwise reach vLLM one of its steps late.
        """
        outputs = self._outputs
        # Where something is there already, `step` returns anyway.
        if outputs is not None and not self._closed.is_set() and outputs.empty():
            from vllm.v1.engine import EngineCoreOutputs

            outputs.put_nowait(EngineCoreOutputs())

    def check_alive(self) -> None:
        """Raises EngineDied where a call has found that out."""
        if self._failure is not None:
            raise self._failure
        if self._engine is None:
            raise HuoyanError("this engine has been closed: open the model again")

    def close(self) -> None:
        """End vLLM's engine and its processes. Safe to call twice, and after a failure."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(Exception):
            self._engine.engine_core.shutdown()
        with contextlib.suppress(Exception):
            self._engine.renderer.shutdown()
        if not hasattr(self._engine.engine_core, "resources"):
            # In this process: what torch.distributed holds would stop the next engine.
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            with contextlib.suppress(Exception):
                cleanup_dist_env_and_memory()
        self._engine = None

    @contextlib.contextmanager
    def _taking(self) -> Iterator[None]:
        """What vLLM finds wrong with a request is the request's fault alone."""
        self.check_alive()
        try:
            yield
        except HuoyanError:
            raise
        except Exception as error:
            if _is_death(error):
                raise self._died(error) from error
            if not is_refusal(error):
                logger.error("vLLM could not take a request", exc_info=error)
            raise InputError(f"vLLM refuses the request: {one_line(error)}") from error

    def _died(self, error: Exception) -> EngineDied:
        """The failure that this call and all that follow raise."""
        logger.debug("vLLM's engine failed", exc_info=error)
        detail = "" if _is_death(error) else f" ({type(error).__name__}: {one_line(error)})"
        self._failure = EngineDied(
            f"vLLM's engine has died{detail}: what it printed says why; open the model again"
        )
        return self._failure


def _watch(closed: threading.Event, resources: Any, outputs: Any) -> None:
    """Wake a waiting `step` where vLLM's engine process was killed, of which vLLM tells its waiters nothing."""
    while not closed.wait(WATCH_SECONDS):
        if resources.engine_dead:
            from vllm.v1.engine.exceptions import EngineDeadError

            outputs.put_nowait(EngineDeadError())
            return


def _is_death(error: Exception) -> bool:
    return type(error).__name__ == "EngineDeadError"
