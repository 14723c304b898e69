"""A thread that owns a backend: requests go in from anywhere, outputs come out through callbacks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from huoyan.api.driver import step
from huoyan.errors import HuoyanError, InputError

if TYPE_CHECKING:
    from huoyan.api.outputs import RequestOutput
    from huoyan.backends.base import Backend
    from huoyan.engine.request import EngineRequest

Batch = Mapping[str, "RequestOutput | HuoyanError"]
Deliver = Callable[[Batch], None]
"""Called in the engine's thread with what a step gave, by request id. It must not block."""


class EngineThread:
    """Runs `backend` until `close`. A failing step ends it, and every request learns why."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._changed = threading.Condition()
        self._new: deque[EngineRequest] = deque()
        self._aborted: deque[str] = deque()
        self._sinks: dict[str, Deliver] = {}
        self._closing = False
        self.failure: HuoyanError | None = None
        self._thread = threading.Thread(target=self._work, name="huoyan-engine", daemon=True)
        self._thread.start()

    def reserve(self, request_id: str, deliver: Deliver) -> None:
        """Make a request's id known before it is prepared.

        Raises:
            InputError: the id is in use.
            HuoyanError: the engine has ended.
        """
        with self._changed:
            self.check_open()
            if request_id in self._sinks:
                raise InputError(f"request id {request_id!r} is in use: give each request its own")
            self._sinks[request_id] = deliver

    def submit(self, request: EngineRequest) -> None:
        """Hand a prepared request in; where it was released meanwhile, it is dropped."""
        with self._changed:
            self.check_open()
            if request.request_id in self._sinks:
                self._new.append(request)
                self._notify()

    def release(self, request_id: str) -> None:
        """Forget a request, ending it early if it still runs. Nothing is delivered for it any more."""
        with self._changed:
            if self._sinks.pop(request_id, None) is not None:
                self._aborted.append(request_id)
                self._notify()

    def abort(self, request_id: str) -> None:
        """End a request early; its last output, with finish_reason "abort", is still delivered."""
        with self._changed:
            if request_id in self._sinks:
                self._aborted.append(request_id)
                self._notify()

    def close(self) -> None:
        """End every request, free the device's memory and stop the thread."""
        with self._changed:
            self._closing = True
            self._notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def num_requests(self) -> int:
        """Requests that are reserved or running."""
        with self._changed:
            return len(self._sinks)

    def check_open(self) -> None:
        """Raises HuoyanError where the engine has ended."""
        if self.failure is not None:
            raise self.failure
        if self._closing:
            raise InputError("this AsyncLLM has been shut down: make a new one")

    def _notify(self) -> None:
        """Wake the thread, whichever it waits for: something to do, or a backend that waits itself."""
        self._changed.notify()
        self._backend.wake()

    def _work(self) -> None:
        try:
            while self._exchange():
                if self._backend.has_unfinished_requests():
                    self._deliver({output.request_id: output for output in step(self._backend)})
            reason: HuoyanError = HuoyanError("the engine was shut down before this request was finished")
        except HuoyanError as error:
            reason = self.failure = error
        except Exception as error:
            message = " ".join(str(error).split())
            reason = self.failure = HuoyanError(f"the engine failed ({type(error).__name__}: {message})")
            reason.__cause__ = error
        with self._changed:
            self._closing = True
            left = list(self._sinks)
        self._deliver(dict.fromkeys(left, reason))
        self._backend.close()

    def _exchange(self) -> bool:
        """Take what was asked for since the last step; wait where there is nothing to do."""
        with self._changed:
            while not (
                self._new or self._aborted or self._closing or self._backend.has_unfinished_requests()
            ):
                self._changed.wait()
            if self._closing:
                return False
            new, aborted = list(self._new), list(self._aborted)
            self._new.clear()
            self._aborted.clear()
        refused: dict[str, RequestOutput | HuoyanError] = {}
        for request in new:
            error = self._add(request)
            if error is not None:
                refused[request.request_id] = error
        for request_id in aborted:
            self._backend.abort_request(request_id)
        self._deliver(refused)
        return True

    def _add(self, request: EngineRequest) -> HuoyanError | None:
        try:
            self._backend.add_request(request)
        except HuoyanError as error:
            return error
        return None

    def _deliver(self, batch: Batch) -> None:
        """Group by receiver: one call for each, however many of its requests moved."""
        grouped: dict[Deliver, dict[str, RequestOutput | HuoyanError]] = {}
        with self._changed:
            for request_id, result in batch.items():
                deliver = self._sinks.get(request_id)
                if deliver is None:
                    continue
                grouped.setdefault(deliver, {})[request_id] = result
                if isinstance(result, HuoyanError) or result.finished:
                    del self._sinks[request_id]
        for deliver, results in grouped.items():
            deliver(results)
