"""One model over two processes of vLLM: the answers of the native engine, which has one."""

from __future__ import annotations

import random
import time

import pytest

from huoyan import LLM, SamplingParams
from tests.contract.compare import TOP, outputs_agree
from tests.contract.conftest import MAX_MODEL_LEN, TINY
from tests.contract.test_answers import prompts


def test_two_processes_share_the_layers(
    monkeypatch: pytest.MonkeyPatch, rng: random.Random, report: list[str]
) -> None:
    """`auto` takes vLLM for it. Words, pictures and a video, sampled greedily and by beams."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    sizes = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8, "enforce_eager": True}
    started = time.perf_counter()
    greedy = SamplingParams(temperature=0, max_tokens=16, logprobs=TOP)
    beams = SamplingParams(temperature=0, max_tokens=8, use_beam_search=True, best_of=3, n=3)
    asked = prompts(rng)
    with (
        LLM(TINY.name, engine="auto", tensor_parallel_size=2, block_size=32, **sizes) as several,
        LLM(TINY.name, device="cpu", dtype="float32", **sizes) as native,
    ):
        report.append(f"two processes: vLLM opened in {time.perf_counter() - started:.0f} s")
        both = [llm.generate(asked, greedy, use_tqdm=False) for llm in (native, several)]
        worst = max(outputs_agree(*pair, TINY.tolerance) for pair in zip(*both, strict=True))
        report.append(f"two processes: log-probabilities of greedy answers differ by at most {worst:.1e}")
        one, other = (llm.generate(asked[1], beams, use_tqdm=False)[0].outputs for llm in (native, several))
        assert [answer.token_ids for answer in one] == [answer.token_ids for answer in other]
