"""huoyan: run the MiniCPM-V vision-language models.

The public names are imported on first use, so that `import huoyan` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from huoyan.version import __version__

if TYPE_CHECKING:
    from huoyan.api.async_llm import AsyncLLM
    from huoyan.api.beam_search import BeamSearchParams
    from huoyan.api.llm import LLM
    from huoyan.api.outputs import CompletionOutput, RequestOutput
    from huoyan.api.sampling_params import SamplingParams
    from huoyan.errors import HuoyanError
    from huoyan.media.picture import Picture
    from huoyan.media.video import Video
    from huoyan.planning.plan import plan
    from huoyan.quantize.run import quantize

_WHERE = {
    "LLM": "huoyan.api.llm",
    "AsyncLLM": "huoyan.api.async_llm",
    "SamplingParams": "huoyan.api.sampling_params",
    "BeamSearchParams": "huoyan.api.beam_search",
    "RequestOutput": "huoyan.api.outputs",
    "CompletionOutput": "huoyan.api.outputs",
    "HuoyanError": "huoyan.errors",
    "Picture": "huoyan.media.picture",
    "Video": "huoyan.media.video",
    "plan": "huoyan.planning.plan",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "HuoyanError",
    "Picture",
    "RequestOutput",
    "SamplingParams",
    "Video",
    "__version__",
    "plan",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name == "quantize":
        return importlib.import_module("huoyan.quantize")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'huoyan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
