"""Both backends on the same checkpoint, opened once each. Runs in an environment that has vLLM."""

from __future__ import annotations

import importlib.util
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import huoyan
from huoyan import LLM
from huoyan.api.outputs import RequestOutput
from huoyan.api.runtime import Runtime
from tests.peer.cases import SIZES, _draw

for name, value in {
    "HUOYAN_CPU_KV_MB": "1024",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 8
MEDIA = Path(huoyan.__file__).parent / "tiny" / "media"
PICTURES = ("airplane.jpg", "stars.jpg", "stars_later.jpg")
_REPORT: list[str] = []


@dataclass(frozen=True)
class Checkpoint:
    name: str
    tolerance: float
    """Of a log-probability: vLLM's int4 computes in 16 bits, and the native engine in float32."""
    processes: bool
    """Whether vLLM's engine is in a process of its own, which is its default; in this one it opens sooner."""

    @property
    def sixteen_bits(self) -> bool:
        return self.tolerance >= 0.1


TINY = Checkpoint("tiny", 5e-3, processes=False)
INT4 = Checkpoint("tiny-int4", 0.1, processes=True)


@dataclass
class Pair:
    """One checkpoint, opened by both engines."""

    checkpoint: Checkpoint
    native: LLM
    vllm: LLM
    vllm_runtime: Runtime

    @property
    def both(self) -> tuple[LLM, LLM]:
        return self.native, self.vllm

    def generate(
        self, prompts: Any, params: Any, **options: Any
    ) -> list[tuple[RequestOutput, RequestOutput]]:
        """Each prompt's output of the native engine and of vLLM."""
        native, vllm = (llm.generate(prompts, params, use_tqdm=False, **options) for llm in self.both)
        return list(zip(native, vllm, strict=True))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "int4: asked of the int4 checkpoint too")
    config.addinivalue_line("markers", "last: asked of one engine that nobody uses afterwards")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        marked = {mark.name for mark in metafunc.definition.iter_markers()}
        which = (INT4,) if "last" in marked else (TINY, INT4) if "int4" in marked else (TINY,)
        metafunc.parametrize("pair", which, indirect=True, scope="session", ids=lambda c: c.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One checkpoint after the other, and at the very end what breaks an engine."""
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    missing = importlib.util.find_spec("vllm") is None
    for item in here:
        item.add_marker(pytest.mark.peer)
        if missing:
            item.add_marker(pytest.mark.skip(reason="vLLM is not in this environment: run `make test-peer`"))
    places = {item: (item.get_closest_marker("last") is not None, "tiny-int4" in item.name) for item in here}
    ordered = iter(sorted(here, key=places.__getitem__))
    items[:] = [next(ordered) if item in places else item for item in items]


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    checkpoint: Checkpoint = request.param
    from huoyan.api.loading import load_runtime
    from huoyan.api.options import parse_options

    sizes = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS, "enforce_eager": True}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(checkpoint.processes))
    started = time.perf_counter()
    # On a CPU vLLM's blocks have 128 tokens unless told otherwise: these prompts would share none.
    runtime = load_runtime(parse_options(checkpoint.name, {"engine": "vllm", "block_size": 32, **sizes}))
    _REPORT.append(f"{checkpoint.name}: vLLM opened in {time.perf_counter() - started:.0f} s")
    native = LLM(checkpoint.name, device="cpu", dtype="float32", **sizes)
    vllm = LLM.from_runtime(runtime)
    yield Pair(checkpoint, native, vllm, runtime)
    native.close()
    vllm.close()


@pytest.fixture
def report() -> list[str]:
    """Lines that are printed after the tests."""
    return _REPORT


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """The same requests in every run, unless HUOYAN_TEST_SEED asks for others.

    The embedded model is undecided about noise: a relative change of 1e-6 of its weights moves some
    log-probabilities by 1e-2, so requests that nobody has looked at cannot be held to rounding.
    """
    return random.Random(f"{os.environ.get('HUOYAN_TEST_SEED', 26)} {request.node.name}")


def drawn(rng: random.Random, largest: int = 1400) -> Image.Image:
    """A picture of any size, whose patches are all different."""
    sizes = [*SIZES.values(), (rng.randint(1, largest), rng.randint(1, largest))]
    return _draw(rng.choice(sizes), str(rng.random()))


def picture(rng: random.Random) -> Image.Image:
    """One the model has an opinion on."""
    return Image.open(MEDIA / rng.choice(PICTURES)).convert("RGB")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _REPORT:
        terminalreporter.section("both backends")
        for line in _REPORT:
            terminalreporter.write_line(line)
