"""What the media stage hands on. Sizes are always (width, height), as Pillow has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Size = tuple[int, int]


@dataclass(frozen=True)
class SliceRules:
    """How the checkpoint's `preprocessor_config.json` wants pictures cut."""

    scale_resolution: int = 448
    patch_size: int = 14
    max_slice_nums: int = 9
    slice_mode: bool = True
    use_image_id: bool = True
    image_feature_size: int = 64
    norm_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    norm_std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class SlicePlan:
    """Where the pixels of one picture go.

    `overview` is the size the whole picture is resized to. Where the picture is sliced, it is also resized
    to `cell * grid` and cut into `grid = (columns, rows)` cells, row by row; otherwise both are None.
    """

    overview: Size
    grid: tuple[int, int] | None = None
    cell: Size | None = None

    @property
    def num_slices(self) -> int:
        """The overview and the cells."""
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class PreparedPicture:
    """One picture, resized and cut, ready for the encoder."""

    key: bytes
    """What the caches compare: a digest of the pixels and of the plan."""
    plan: SlicePlan
    slices: tuple[NDArray[np.uint8], ...]
    """uint8 [height, width, 3], overview first, sides divisible by the patch size."""


@dataclass(frozen=True)
class MediaItem:
    """What one placeholder of a prompt stands for: a picture, or the frames of a video.

    `None` leaves a choice to the checkpoint's rules.
    """

    pictures: tuple[Any, ...]
    """`huoyan.media.picture.Picture`, one for an image, one a frame for a video."""
    kind: str = "image"
    max_slice_nums: int | None = None
    use_image_id: bool | None = None
