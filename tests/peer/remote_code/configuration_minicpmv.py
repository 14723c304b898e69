"""The configuration class that vLLM asks a MiniCPM-V checkpoint for (put into a temporary copy of it)."""

from transformers import PretrainedConfig, Qwen2Config, SiglipVisionConfig


class SliceConfig(PretrainedConfig):
    model_type = "minicpmv"

    def __init__(self, max_slice_nums=9, patch_size=14, scale_resolution=448, **rest):
        super().__init__(**rest)
        self.max_slice_nums = max_slice_nums
        self.patch_size = patch_size
        self.scale_resolution = scale_resolution


class MiniCPMVConfig(Qwen2Config):
    model_type = "minicpmv"

    def __init__(self, vision_config=None, slice_config=None, **sizes):
        self.vision_config = SiglipVisionConfig(**(vision_config or {}))
        self.slice_config = SliceConfig(**(slice_config or {}))
        self.patch_size = self.vision_config.patch_size
        self.query_num = sizes.pop("query_num", 64)
        self.image_size = sizes.pop("image_size", 448)
        self.slice_mode = sizes.pop("slice_mode", True)
        self.use_image_id = sizes.pop("use_image_id", True)
        self.batch_vision_input = sizes.pop("batch_vision_input", True)
        self.drop_vision_last_layer = sizes.pop("drop_vision_last_layer", False)
        sizes.pop("patch_size", None)
        super().__init__(**sizes)
