"""Pictures to patches for vLLM, which has no code of its own for this.

A second implementation after the published description, plain and unoptimised, sharing nothing with
huoyan.media: where the two disagree, token ids or log-probabilities do.
"""

from math import ceil, inf, log, sqrt

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

FIELDS = {
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "image_feature_size": 64,
    "use_image_id": True,
    "slice_mode": True,
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
    "unk": "<unk>",
    "norm_mean": (0.5, 0.5, 0.5),
    "norm_std": (0.5, 0.5, 0.5),
    "version": 2.6,
}


class MiniCPMVImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]  # noqa: RUF012

    # vLLM offers a keyword to a processor only where its signature names it.
    def __init__(self, max_slice_nums=9, **fields):
        values = {name: fields.pop(name, default) for name, default in FIELDS.items()}
        super().__init__(**fields)
        for name, value in values.items():
            setattr(self, name, value)
        self.max_slice_nums = max_slice_nums

    def get_sliced_grid(self, image_size, max_slice_nums=None):
        limit = self.max_slice_nums if max_slice_nums is None else int(max_slice_nums)
        width, height = (int(side) for side in image_size)
        wanted = min(ceil(width * height / self.scale_resolution**2), limit)
        if wanted <= 1:
            return None
        best, smallest = None, inf
        for count in (wanted - 1, wanted, wanted + 1):
            if count == 1 or count > limit:
                continue
            for columns in range(1, count + 1):
                rows, rest = divmod(count, columns)
                if rest:
                    continue
                error = abs(log(width / height) - log(columns / rows))
                if error < smallest:
                    best, smallest = [columns, rows], error
        return best

    def get_slice_image_placeholder(self, image_size, image_idx=0, max_slice_nums=None, use_image_id=None):
        numbered = self.use_image_id if use_image_id is None else use_image_id
        embeddings = self.unk * self.image_feature_size
        text = f"{self.im_id_start}{image_idx}{self.im_id_end}" if numbered else ""
        text += self.im_start + embeddings + self.im_end
        grid = self.get_sliced_grid(image_size, max_slice_nums)
        if grid is not None:
            row = (self.slice_start + embeddings + self.slice_end) * grid[0]
            text += "\n".join([row] * grid[1])
        return text

    def preprocess(self, images, max_slice_nums=None, **_):
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images[0], Image.Image):
            images = [images]
        pixels, sizes, grids = [], [], []
        for group in images:
            parts = [part for image in group for part in self._cut(self._rgb(image), max_slice_nums)]
            pixels.append([self._patches(part) for part in parts])
            sizes.append([torch.tensor(self._rgb(image).size) for image in group])
            sides = [[part.height // self.patch_size, part.width // self.patch_size] for part in parts]
            grids.append(torch.tensor(sides))
        return BatchFeature({"pixel_values": pixels, "image_sizes": sizes, "tgt_sizes": grids})

    def _rgb(self, image):
        return (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert(
            "RGB"
        )

    def _cut(self, image, max_slice_nums):
        grid = self.get_sliced_grid(image.size, max_slice_nums)
        if grid is None:
            return [image.resize(self._fit(image.size, upscale=True), Image.Resampling.BICUBIC)]
        columns, rows = grid
        overview = image.resize(self._fit(image.size, upscale=False), Image.Resampling.BICUBIC)
        inner = (_nearest(image.width, columns) / columns, _nearest(image.height, rows) / rows)
        width, height = self._fit(inner, upscale=True)
        whole = image.resize((width * columns, height * rows), Image.Resampling.BICUBIC)
        corners = [(x * width, y * height) for y in range(rows) for x in range(columns)]
        return [overview, *(whole.crop((x, y, x + width, y + height)) for x, y in corners)]

    def _fit(self, size, upscale):
        width, height = size
        if upscale or width * height > self.scale_resolution**2:
            ratio = width / height
            height = int(self.scale_resolution / sqrt(ratio))
            width = int(height * ratio)
        return _nearest(width, self.patch_size), _nearest(height, self.patch_size)

    def _patches(self, image):
        """[3, side, side * patches]: the patches one behind the other, row by row."""
        side = self.patch_size
        values = np.asarray(image, dtype=np.float32) / 255
        values = (values - np.float32(self.norm_mean)) / np.float32(self.norm_std)
        rows, columns = values.shape[0] // side, values.shape[1] // side
        tiles = values.reshape(rows, side, columns, side, 3).transpose(4, 1, 0, 2, 3)
        return torch.from_numpy(np.ascontiguousarray(tiles.reshape(3, side, -1)))


def _nearest(length, unit):
    return max(round(length / unit) * unit, unit)
