"""The keyword arguments of `LLM`: used, harmless, or refused with a reason."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from huoyan.api import options
from huoyan.api.options import parse_options
from huoyan.errors import InputError, UnsupportedError


def test_the_recipes_calls_are_accepted() -> None:
    parsed = parse_options(
        Path("model"), {"gpu_memory_utilization": 1, "trust_remote_code": True, "max_model_len": 2048}
    )
    assert parsed.model == "model"
    assert parsed.max_model_len == 2048
    assert parsed.gpu_memory_utilization == 1


@pytest.mark.parametrize(
    "given",
    [
        {"swap_space": 4, "disable_log_stats": True, "max_seq_len_to_capture": 8192},
        {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "kv_cache_dtype": "auto"},
        {"quantization": "awq"},
        {"kv_cache_dtype": "fp8_e5m2", "speculative_config": None, "speculative_model": None},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}},
        {"quantization": None, "load_format": "dummy", "enforce_eager": True},
        {"hf_overrides": {}, "generation_config": "auto", "tokenizer_mode": "auto"},
        {"limit_mm_per_prompt": {"image": 4, "video": 0}},
    ],
)
def test_harmless_ones_are_accepted(given: dict[str, Any]) -> None:
    parse_options("m", given)


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        ({"tensor_parallel_size": 2}, "engine='vllm'"),
        ({"pipeline_parallel_size": 2}, "engine='vllm'"),
        ({"quantization": "gptq"}, "leave it out"),
        ({"enable_lora": True}, "merge the adapter"),
        ({"kv_cache_dtype": "nvfp4"}, "int8"),
        ({"cpu_offload_gb": 8}, "int4"),
        ({"speculative_config": {"method": "eagle", "num_speculative_tokens": 2}}, "'ngram'"),
        ({"speculative_model": "small"}, "speculative_config"),
        ({"load_format": "pt"}, "safetensors"),
        ({"hf_overrides": {"rope_theta": 1}}, "config.json"),
    ],
)
def test_what_would_change_the_result_is_refused(given: dict[str, Any], way_out: str) -> None:
    with pytest.raises(UnsupportedError, match=way_out):
        parse_options("m", given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_model_length": 5}, "did you mean 'max_model_len'"),
        ({"gpu_memory_utilisation": 0.5}, "did you mean 'gpu_memory_utilization'"),
        ({"completely_else": 5}, "no option 'completely_else'"),
        ({"gpu_memory_utilization": 1.5}, "fraction"),
        ({"gpu_memory_utilization": 0}, "fraction"),
        ({"max_num_seqs": 0}, "at least 1"),
        ({"max_model_len": 2.5}, "whole number"),
        ({"max_model_len": True}, "whole number"),
        ({"dtype": "int8"}, "dtype"),
        ({"speculative_config": {"method": "ngram"}}, "num_speculative_tokens"),
        ({"engine": "tgi"}, "engine"),
        ({"limit_mm_per_prompt": {"sound": 1}}, "image and video"),
        ({"limit_mm_per_prompt": {"image": -1}}, "at least 0"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_options("m", given)


def test_a_model_must_be_a_name() -> None:
    with pytest.raises(InputError, match="not NoneType"):
        parse_options(None, {})


def test_torch_dtypes_are_understood() -> None:
    torch = pytest.importorskip("torch")
    assert parse_options("m", {"dtype": torch.float16}).dtype == "float16"
    assert parse_options("m", {"device": torch.device("cpu")}).device == "cpu"


def test_remote_code_is_noted_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_noted_remote_code", False)
    with caplog.at_level(logging.INFO, "huoyan"):
        parse_options("m", {"trust_remote_code": True})
        parse_options("m", {"trust_remote_code": True})
        parse_options("m", {"trust_remote_code": False})
    assert [record.message for record in caplog.records] == [
        "trust_remote_code is accepted and not needed: no code of the checkpoint is run"
    ]


def test_vllms_way_of_naming_frames() -> None:
    parsed = parse_options("m", {"media_io_kwargs": {"video": {"num_frames": 8}}})
    assert parsed.mm_processor_kwargs == {"num_frames": 8}
    with pytest.raises(UnsupportedError):
        parse_options("m", {"media_io_kwargs": {"audio": {}}})
