"""`config.json` of MiniCPM-V 2.6 as transformers and vLLM take it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen2Config, SiglipVisionConfig


class MiniCPMVSliceConfig(PretrainedConfig):  # type: ignore[misc]
    """The field `slice_config`. What counts is in `preprocessor_config.json`."""

    model_type = "minicpmv"

    def __init__(
        self, max_slice_nums: int = 9, patch_size: int = 14, scale_resolution: int = 448, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self.max_slice_nums = max_slice_nums
        self.patch_size = patch_size
        self.scale_resolution = scale_resolution


class MiniCPMVConfig(Qwen2Config):  # type: ignore[misc]
    """The decoder's sizes at top level, the encoder's in `vision_config` (SigLIP), the resampler's beside them."""

    model_type = "minicpmv"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        slice_config: dict[str, Any] | None = None,
        query_num: int = 64,
        image_size: int = 448,
        slice_mode: bool = True,
        use_image_id: bool = True,
        batch_vision_input: bool = True,
        drop_vision_last_layer: bool = False,
        **sizes: Any,
    ) -> None:
        self.vision_config = SiglipVisionConfig(**(vision_config or {}))
        self.slice_config = MiniCPMVSliceConfig(**(slice_config or {}))
        self.query_num = query_num
        self.image_size = image_size
        self.slice_mode = slice_mode
        self.use_image_id = use_image_id
        self.batch_vision_input = batch_vision_input
        self.drop_vision_last_layer = drop_vision_last_layer
        # The patches are the encoder's, whatever a stale copy at top level says.
        sizes.pop("patch_size", None)
        self.patch_size = self.vision_config.patch_size
        super().__init__(**sizes)
