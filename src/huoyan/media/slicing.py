"""Where the pixels of a picture go: the checkpoint's slicing rules, in whole numbers.

A picture becomes an overview of about `scale_resolution` squared pixels and, where it is larger than
that, a grid of cells of about the same area each, so that small print stays readable.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huoyan.errors import InputError, MediaError, ModelError
from huoyan.media.types import Size, SlicePlan, SliceRules
from huoyan.models.config import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RULES_FILE = "preprocessor_config.json"

# A slice holds about (scale_resolution / patch_size)² patches, whatever its shape, until its short side
# would fall under one patch; from there on the long side grows without end. A strip of one pixel still
# fits below this many times the usual count up to 1:65 000, the longest side of a JPEG.
MAX_SLICE_GROWTH = 8


def plan_slices(size: Size, rules: SliceRules, max_slice_nums: int | None = None) -> SlicePlan:
    """The overview's size, the grid and the cell's size for a picture of `size` (width, height) pixels.

    `max_slice_nums` overrides the checkpoint's own; 1 never slices. Where the rules have `slice_mode`
    off, nothing is sliced whatever `max_slice_nums` says. Every side is a multiple of the patch size.
    A side may be longer than the 70 patches of the position table: positions are fractions of the side.

    Raises InputError for a bad `max_slice_nums`, MediaError for a size that is empty or a strip so thin
    that one slice would not fit the encoder.
    """
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"the picture is empty ({width}x{height} pixels)")
    limit = _slice_limit(rules, max_slice_nums)
    pieces = min(math.ceil(width * height / (rules.scale_resolution * rules.scale_resolution)), limit)
    if pieces <= 1:
        plan = SlicePlan(overview=_best_size(size, rules, upscale=True))
    else:
        columns, rows = grid = _best_grid(size, pieces, limit)
        cell_of_picture = (
            _nearest_multiple(width, columns) // columns,
            _nearest_multiple(height, rows) // rows,
        )
        plan = SlicePlan(
            overview=_best_size(size, rules, upscale=False),
            grid=grid,
            cell=_best_size(cell_of_picture, rules, upscale=True),
        )
    _check_encodable(size, plan, rules)
    return plan


def cut_slices(rgb: NDArray[np.uint8], plan: SlicePlan) -> tuple[NDArray[np.uint8], ...]:
    """The slices of `rgb` (uint8 [height, width, 3]): the overview, then the cells row by row.

    Every resize is Pillow's bicubic on 8-bit RGB; Pillow's bytes are the result. The arrays are writable
    copies, as `torch.from_numpy` likes them.
    """
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(rgb)
    slices = [np.array(picture.resize(plan.overview, Image.Resampling.BICUBIC))]
    if plan.grid is not None and plan.cell is not None:
        (columns, rows), (width, height) = plan.grid, plan.cell
        whole = np.asarray(picture.resize((width * columns, height * rows), Image.Resampling.BICUBIC))
        slices += [
            whole[y : y + height, x : x + width].copy()
            for y in range(0, rows * height, height)
            for x in range(0, columns * width, width)
        ]
    return tuple(slices)


def read_slice_rules(folder: str | Path) -> SliceRules:
    """The rules of the checkpoint in `folder`, from its `preprocessor_config.json`.

    Sizes must be in the file; the switches and the normalisation have the published processor's
    defaults. Raises ModelError naming the file and the field.
    """
    path = Path(folder) / RULES_FILE
    fields = read_json(path)
    rules = SliceRules(
        scale_resolution=_positive(fields, "scale_resolution", path),
        patch_size=_positive(fields, "patch_size", path),
        max_slice_nums=_positive(fields, "max_slice_nums", path),
        slice_mode=_switch(fields, "slice_mode", True, path),
        use_image_id=_switch(fields, "use_image_id", False, path),
        image_feature_size=_positive(fields, "image_feature_size", path),
        norm_mean=_channels(fields, "norm_mean", path),
        norm_std=_channels(fields, "norm_std", path),
    )
    if rules.scale_resolution < rules.patch_size:
        raise ModelError(f"{path}: scale_resolution {rules.scale_resolution} is under the patch size")
    if 0.0 in rules.norm_std:
        raise ModelError(f"{path}: norm_std must not hold a zero")
    return rules


def _slice_limit(rules: SliceRules, override: int | None) -> int:
    if override is not None and (isinstance(override, bool) or not isinstance(override, int) or override < 1):
        raise InputError(f"max_slice_nums must be a whole number of at least 1, not {override!r}")
    if not rules.slice_mode:
        return 1
    return rules.max_slice_nums if override is None else override


def _best_grid(size: Size, pieces: int, limit: int) -> tuple[int, int]:
    """The (columns, rows) whose shape is nearest the picture's, the first of equals."""
    shape = math.log(size[0] / size[1])
    grids = [
        (columns, count // columns)
        for count in (pieces - 1, pieces, pieces + 1)
        if count != 1 and count <= limit
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))


def _best_size(size: Size, rules: SliceRules, *, upscale: bool) -> Size:
    width, height = size
    target = rules.scale_resolution
    if upscale or width * height > target * target:
        # The order of these operations is the published one: another one rounds differently.
        ratio = width / height
        height = int(target / math.sqrt(ratio))
        width = int(height * ratio)
    return _nearest_multiple(width, rules.patch_size), _nearest_multiple(height, rules.patch_size)


def _nearest_multiple(length: int, unit: int) -> int:
    return max(round(length / unit) * unit, unit)


def _check_encodable(size: Size, plan: SlicePlan, rules: SliceRules) -> None:
    usual = (rules.scale_resolution // rules.patch_size) ** 2
    for width, height in (plan.overview, plan.cell or plan.overview):
        patches = (width // rules.patch_size) * (height // rules.patch_size)
        if patches > MAX_SLICE_GROWTH * usual:
            raise MediaError(
                f"a picture of {size[0]}x{size[1]} pixels is too thin a strip: {patches} patches a slice "
                f"(at most {MAX_SLICE_GROWTH * usual}); cut it into shorter pieces"
            )


def _positive(fields: dict[str, Any], name: str, path: Path) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = "is missing" if value is None else f"is {value!r}"
        raise ModelError(f"{path}: {name} {found}; it must be a whole number of at least 1")
    return value


def _switch(fields: dict[str, Any], name: str, default: bool, path: Path) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise ModelError(f"{path}: {name} is {value!r}; it must be true or false")
    return value


def _channels(fields: dict[str, Any], name: str, path: Path) -> tuple[float, float, float]:
    value = fields.get(name, (0.5, 0.5, 0.5))
    numbers = [x for x in value if isinstance(x, (int, float))] if isinstance(value, (list, tuple)) else []
    if len(numbers) != 3 or len(value) != 3 or not all(map(math.isfinite, numbers)):
        raise ModelError(f"{path}: {name} is {value!r}; it must be three numbers")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
