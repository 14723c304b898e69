"""Pictures to patches and to placeholders, as vLLM asks a checkpoint's image processor for them.

The rules are those of `huoyan.media.slicing` and `huoyan.prompt.placeholders`, so both engines see the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from huoyan.errors import MediaError
from huoyan.media.arrays import array_to_rgb, tensor_to_array
from huoyan.media.decode import image_to_rgb
from huoyan.media.slicing import cut_slices, plan_slices
from huoyan.media.types import Size, SliceRules
from huoyan.models.published_patches import published_patches
from huoyan.prompt.placeholders import Layout, Mark, Tags


class MiniCPMVImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """`preprocessor_config.json` as an object; the defaults are the published model's."""

    model_input_names = ["image_sizes", "pixel_values", "tgt_sizes"]  # noqa: RUF012

    def __init__(
        self,
        max_slice_nums: int = 9,
        scale_resolution: int = 448,
        patch_size: int = 14,
        use_image_id: bool = True,
        image_feature_size: int = 64,
        slice_mode: bool = True,
        norm_mean: Sequence[float] = (0.5, 0.5, 0.5),
        norm_std: Sequence[float] = (0.5, 0.5, 0.5),
        im_start: str = "<image>",
        im_end: str = "</image>",
        slice_start: str = "<slice>",
        slice_end: str = "</slice>",
        im_id_start: str = "<image_id>",
        im_id_end: str = "</image_id>",
        unk: str = "<unk>",
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.max_slice_nums = max_slice_nums
        self.scale_resolution = scale_resolution
        self.patch_size = patch_size
        self.use_image_id = use_image_id
        self.image_feature_size = image_feature_size
        self.slice_mode = slice_mode
        self.norm_mean = list(norm_mean)
        self.norm_std = list(norm_std)
        self.im_start = im_start
        self.im_end = im_end
        self.slice_start = slice_start
        self.slice_end = slice_end
        self.im_id_start = im_id_start
        self.im_id_end = im_id_end
        self.unk = unk

    @property
    def rules(self) -> SliceRules:
        mean, std = map(float, self.norm_mean), map(float, self.norm_std)
        return SliceRules(
            scale_resolution=self.scale_resolution,
            patch_size=self.patch_size,
            max_slice_nums=self.max_slice_nums,
            slice_mode=self.slice_mode,
            use_image_id=self.use_image_id,
            image_feature_size=self.image_feature_size,
            norm_mean=(next(mean), next(mean), next(mean)),
            norm_std=(next(std), next(std), next(std)),
        )

    def get_sliced_grid(self, image_size: Size, max_slice_nums: int | None = None) -> tuple[int, int] | None:
        """(columns, rows) of the cells of a picture of `image_size` (width, height); None where it is not cut."""
        return plan_slices(_size(image_size), self.rules, max_slice_nums).grid

    def get_slice_image_placeholder(
        self,
        image_size: Size,
        image_idx: int = 0,
        max_slice_nums: int | None = None,
        use_image_id: bool | None = None,
    ) -> str:
        """What stands in the prompt for a picture of `image_size` (width, height), the `image_idx`-th there."""
        tags = Tags(
            self.im_start, self.im_end, self.slice_start, self.slice_end,
            self.im_id_start, self.im_id_end, self.unk,
        )  # fmt: skip
        marks = {Mark.NUMBER: str(image_idx), Mark.RUN: self.unk * self.image_feature_size}
        numbered = self.use_image_id if use_image_id is None else use_image_id
        pieces = Layout(tags).pieces(self.get_sliced_grid(image_size, max_slice_nums), numbered)
        return "".join(marks[piece] if isinstance(piece, Mark) else piece for piece in pieces)

    def preprocess(self, images: Any, max_slice_nums: int | None = None, **_: Any) -> BatchFeature:
        """Cut and normalise the pictures of one prompt, or of several.

        Args:
            images: a picture, a list of them, or a list of such lists, one for each prompt. A picture is a PIL
                image or an array ([height, width, 3]; tensors also channels first).

        Returns, for each prompt:
            pixel_values: for each slice of its pictures float32 [3, patch, patches * patch].
            image_sizes: for each picture int64 [2], (width, height).
            tgt_sizes: int64 [slices, 2], (rows, columns) of patches.

        Raises:
            MediaError, InputError: a picture that cannot be cut, a bad `max_slice_nums`.
        """
        pixel_values, image_sizes, tgt_sizes = [], [], []
        for pictures in _by_prompt(images):
            slices: list[NDArray[np.uint8]] = []
            sizes = []
            for picture in map(_rgb, pictures):
                height, width, _channels = picture.shape
                plan = plan_slices((width, height), self.rules, max_slice_nums)
                slices += cut_slices(picture, plan)
                sizes.append(torch.tensor([width, height]))
            patches, grids = published_patches(slices, self.rules)
            pixel_values.append(patches)
            image_sizes.append(sizes)
            tgt_sizes.append(torch.tensor(grids).reshape(-1, 2))
        return BatchFeature(
            {"pixel_values": pixel_values, "image_sizes": image_sizes, "tgt_sizes": tgt_sizes}
        )


def _by_prompt(images: Any) -> list[list[Any]]:
    """A list of pictures for each prompt. An array [frames, height, width, 3] is the pictures of one prompt."""
    if isinstance(images, Image.Image) or getattr(images, "ndim", 0) in (2, 3):
        return [[images]]
    prompts = list(images)
    if prompts and (isinstance(prompts[0], Image.Image) or getattr(prompts[0], "ndim", 0) in (2, 3)):
        return [prompts]
    return [list(pictures) for pictures in prompts]


def _size(size: Any) -> Size:
    width, height = (int(side) for side in size)
    return width, height


def _rgb(picture: Any) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]. Nothing is turned by EXIF here: vLLM has written the size into the prompt as it is."""
    if isinstance(picture, Image.Image):
        return image_to_rgb(picture, "the picture")
    if isinstance(picture, Tensor):
        return array_to_rgb(tensor_to_array(picture), "the tensor")
    if isinstance(picture, np.ndarray):
        return array_to_rgb(picture, "the array")
    raise MediaError(
        f"a picture cannot be made from a {type(picture).__name__}; give a PIL image or an array"
    )
