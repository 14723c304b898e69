"""Pictures to patches and placeholders, a second time.

Written after the description of the format, plain and unoptimised, sharing nothing with huoyan: where the two
disagree, a test fails. The defaults are the published `preprocessor_config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, log, sqrt

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Reference:
    max_slice_nums: int = 9
    scale_resolution: int = 448
    patch_size: int = 14
    image_feature_size: int = 64
    use_image_id: bool = True
    norm_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    norm_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def grid(self, size: tuple[int, int], max_slice_nums: int | None = None) -> tuple[int, int] | None:
        limit = max_slice_nums or self.max_slice_nums
        width, height = size
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
                    best, smallest = (columns, rows), error
        return best

    def placeholder(
        self,
        size: tuple[int, int],
        number: int = 0,
        max_slice_nums: int | None = None,
        use_image_id: bool | None = None,
    ) -> str:
        numbered = self.use_image_id if use_image_id is None else use_image_id
        embeddings = "<unk>" * self.image_feature_size
        text = f"<image_id>{number}</image_id>" if numbered else ""
        text += f"<image>{embeddings}</image>"
        grid = self.grid(size, max_slice_nums)
        if grid is not None:
            text += "\n".join([f"<slice>{embeddings}</slice>" * grid[0]] * grid[1])
        return text

    def slices(self, image: Image.Image, max_slice_nums: int | None = None) -> list[Image.Image]:
        """RGB, the overview first."""
        grid = self.grid(image.size, max_slice_nums)
        if grid is None:
            return [image.resize(self._fit(image.size, upscale=True), Image.Resampling.BICUBIC)]
        columns, rows = grid
        overview = image.resize(self._fit(image.size, upscale=False), Image.Resampling.BICUBIC)
        inner = (_nearest(image.width, columns) / columns, _nearest(image.height, rows) / rows)
        width, height = self._fit(inner, upscale=True)
        whole = image.resize((width * columns, height * rows), Image.Resampling.BICUBIC)
        corners = [(x * width, y * height) for y in range(rows) for x in range(columns)]
        return [overview, *(whole.crop((x, y, x + width, y + height)) for x, y in corners)]

    def patches(self, image: Image.Image) -> torch.Tensor:
        """[3, patch, patch * patches]: the patches one behind the other, row by row."""
        side = self.patch_size
        values = np.asarray(image, dtype=np.float32) / 255
        values = (values - np.float32(self.norm_mean)) / np.float32(self.norm_std)
        rows, columns = values.shape[0] // side, values.shape[1] // side
        tiles = values.reshape(rows, side, columns, side, 3).transpose(4, 1, 0, 2, 3)
        return torch.from_numpy(np.ascontiguousarray(tiles.reshape(3, side, -1)))

    def _fit(self, size: tuple[float, float], upscale: bool) -> tuple[int, int]:
        width, height = size
        if upscale or width * height > self.scale_resolution**2:
            ratio = width / height
            height = int(self.scale_resolution / sqrt(ratio))
            width = int(height * ratio)
        return _nearest(width, self.patch_size), _nearest(height, self.patch_size)


def _nearest(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)
