"""From arrays and tensors to 8-bit RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from huoyan.errors import MediaError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def array_to_rgb(array: NDArray[Any], name: str = "the array") -> NDArray[np.uint8]:
    """[height, width] or [height, width, 1 | 3 | 4] to uint8 [height, width, 3], read-only, not shared.

    uint8 as it is; uint16 by its high byte; bool as black and white; other integers must be within 0..255;
    floats must be within 0..1. A fourth channel is alpha and shows white behind. Raises MediaError.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        first = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise MediaError(
            f"{name} has shape {list(array.shape)}; a picture is [height, width(, 1 | 3 | 4)]{first}"
        )
    if 0 in array.shape:
        raise MediaError(f"{name} is empty (shape {list(array.shape)})")
    values = to_uint8(array, name)
    if values.shape[2] == 4:
        from PIL import Image

        from huoyan.media.decode import image_to_rgb

        return image_to_rgb(Image.fromarray(np.ascontiguousarray(values)), name)
    pixels = np.repeat(values, 3, axis=2) if values.shape[2] == 1 else np.array(values, order="C")
    pixels.flags.writeable = False
    return pixels


def to_uint8(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """The values of `array` on the scale 0..255. Raises MediaError where that would be a guess."""
    kind = array.dtype.kind
    values: NDArray[np.uint8]
    if array.dtype == np.uint8:
        values = array
    elif array.dtype == np.uint16:
        values = np.right_shift(array, 8).astype(np.uint8)
    elif kind == "b":
        values = array.astype(np.uint8) * np.uint8(255)
    elif kind in "iuf":
        low, high = float(array.min()), float(array.max())
        top = 1.0 if kind == "f" else 255.0
        if not (low >= 0.0 and high <= top):
            raise MediaError(
                f"{name} has {array.dtype} values from {low:g} to {high:g}; they must be within 0..{top:g} "
                f"(or give uint8 of 0..255)"
            )
        scaled = np.rint(array.astype(np.float32, copy=False) * np.float32(255)) if kind == "f" else array
        values = scaled.astype(np.uint8)
    else:
        raise MediaError(f"{name} has dtype {array.dtype}; give uint8, uint16, or floats within 0..1")
    return values


def tensor_to_array(tensor: Any, name: str = "the tensor") -> NDArray[Any]:
    """A torch tensor as a NumPy array, channels last; [1 | 3 | 4, height, width] is channels first."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    if tensor.ndim == 3 and tensor.shape[0] in (1, 3, 4):
        tensor = tensor.permute(1, 2, 0)
    array: NDArray[Any] = tensor.numpy()
    return array
