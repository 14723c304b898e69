"""What runs requests: our own engine, or vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from huoyan.api.outputs import RequestOutput
    from huoyan.engine.request import EngineRequest


class Backend(Protocol):
    """One model on one set of devices. Not thread-safe: one thread calls it, `wake` apart."""

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request. Raises InputError where it can never run (too long, unknown option)."""

    def abort_request(self, request_id: str) -> None:
        """End a request early; unknown or finished ids are ignored."""

    def has_unfinished_requests(self) -> bool: ...

    def step(self) -> list[RequestOutput]:
        """Run one step and return the state of every request that gained a token or ended in it.

        `outputs` are cumulative. An aborted request is returned once, with finish_reason "abort".
        """

    def wake(self) -> None:
        """There is something new to hand over: a step that only waits for another process returns at once.

        Any thread may call it. It does nothing where a step computes itself.
        """

    def close(self) -> None:
        """Free the device's memory."""
