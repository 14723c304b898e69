"""The KV cache in 8 bits: what it takes, and how far it is from the exact one."""

from __future__ import annotations

import pytest

from huoyan.engine.config import EngineConfig
from huoyan.engine.kv_format import kv_bytes_per_token
from huoyan.errors import InputError
from huoyan.models.config import TextConfig

FULL_SIZE = TextConfig(3584, 18944, 28, 28, 4, 151666, 32768, head_dim=128)


def test_eight_bits_hold_almost_twice_the_tokens() -> None:
    exact = kv_bytes_per_token(FULL_SIZE, 2)
    assert exact == 2 * 28 * 4 * 128 * 2
    assert exact / kv_bytes_per_token(FULL_SIZE, 2, "int8") == pytest.approx(256 / 136)
    assert exact / kv_bytes_per_token(FULL_SIZE, 2, "fp8") == pytest.approx(256 / 130)
    for name in ("int8", "fp8", "fp8_e4m3", "fp8_e5m2"):
        assert exact / kv_bytes_per_token(FULL_SIZE, 2, name) > 1.88


def test_a_mistyped_dtype_is_named() -> None:
    for wrong in ("int4", "", "fp8_e3m4", None):
        with pytest.raises(InputError, match="use auto, int8, fp8"):
            EngineConfig(kv_cache_dtype=wrong)  # type: ignore[arg-type]
