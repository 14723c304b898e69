"""What kernels write into the host's memory, where nobody but us knows that they do."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from huoyan.engine import host_copy
from huoyan.engine.host_copy import HostCopy


class Event:
    """Of a device that is done when the test says so."""

    def __init__(self) -> None:
        self.done = False
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_memory_stays_until_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    host_copy._in_writing.clear()
    cuda = torch.device("cuda")
    first, second = (torch.tensor([value]) for value in (3, 4))
    lives = weakref.ref(first)
    HostCopy.written(first, cuda)
    del first
    copy = HostCopy.written(second, cuda)
    gc.collect()
    # Nobody reads the first, and it is still to be written.
    assert lives() is not None
    event = host_copy._in_writing[0][0]
    assert event.recorded
    event.done = True  # type: ignore[attr-defined]
    HostCopy.written(torch.tensor([5]), cuda)
    gc.collect()
    assert lives() is None
    (found,) = copy.read()
    assert found.tolist() == [4]
    assert len(host_copy._in_writing) == 2
    host_copy._in_writing.clear()


def test_on_a_cpu_it_is_there() -> None:
    (found,) = HostCopy.written(torch.tensor([7]), torch.device("cpu")).read()
    assert found.tolist() == [7]
    assert not host_copy._in_writing
