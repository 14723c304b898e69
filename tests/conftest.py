"""Shared by all tests: a fresh but printed seed, GPU tests skipped where there is none."""

from __future__ import annotations

import os
import random
import signal

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background deaf to Ctrl-C, and some tests are about Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
SEED = int(os.environ.get("HUOYAN_TEST_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header() -> str:
    return f"HUOYAN_TEST_SEED={SEED}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: run `make test-gpu` on one"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this run and test; HUOYAN_TEST_SEED repeats a run."""
    return (SEED + sum(map(ord, request.node.name))) % 2**31
