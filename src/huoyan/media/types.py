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

    @property
    def num_pixels(self) -> int:
        """Of all slices together."""
        cells = 0 if self.cell is None else (self.num_slices - 1) * self.cell[0] * self.cell[1]
        return self.overview[0] * self.overview[1] + cells


class PreparedPicture:
    """One picture, ready for the encoder: resized and cut, or as it is with the plan to do so where it is encoded."""

    def __init__(
        self,
        key: bytes,
        plan: SlicePlan,
        slices: tuple[NDArray[np.uint8], ...] | None = None,
        original: NDArray[np.uint8] | None = None,
    ) -> None:
        """One of `slices` (see there) and `original`, uint8 [height, width, 3]."""
        self.key = key
        """What the caches compare: a digest of the pixels and of the plan."""
        self.plan = plan
        self.original = original
        """The pixels of a picture that the encoder's device resizes."""
        self._slices = slices

    @property
    def num_slices(self) -> int:
        return self.plan.num_slices if self._slices is None else len(self._slices)

    def patches(self, patch_size: int) -> list[int]:
        """Of each slice."""
        if self._slices is not None:
            return [(s.shape[0] // patch_size) * (s.shape[1] // patch_size) for s in self._slices]

        def of(size: Size) -> int:
            return (size[0] // patch_size) * (size[1] // patch_size)

        return [of(self.plan.overview), *[of(self.plan.cell or (0, 0))] * (self.num_slices - 1)]

    @property
    def slices(self) -> tuple[NDArray[np.uint8], ...]:
        """uint8 [height, width, 3], overview first, sides divisible by the patch size; cut anew each time from an
        original."""
        if self._slices is not None:
            return self._slices
        from huoyan.media.slicing import cut_slices

        assert self.original is not None
        return cut_slices(self.original, self.plan)


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
