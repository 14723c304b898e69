"""The model as vLLM runs it: its own MiniCPM-V 2.6, with our processor. Imported when a folder of it is met."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.minicpmv import MiniCPMV2_6, MiniCPMVDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from huoyan.vllm_plugin.processor import HuoyanMultiModalProcessor, HuoyanProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(  # type: ignore[untyped-decorator, unused-ignore]
    HuoyanMultiModalProcessor, info=HuoyanProcessingInfo, dummy_inputs=MiniCPMVDummyInputsBuilder
)
class HuoyanMiniCPMV(MiniCPMV2_6):  # type: ignore[misc]
    """vLLM's MiniCPM-V 2.6."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        answer_without_cuda()
        super().__init__(vllm_config=vllm_config, prefix=prefix)


def answer_without_cuda() -> None:
    """The resampler asks whether a CUDA graph is captured. A torch built without CUDA raises; the answer is no."""
    if not torch.backends.cuda.is_built():
        torch.cuda.is_current_stream_capturing = lambda: False
