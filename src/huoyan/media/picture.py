"""`Picture`: one still image, decoded, ready to be asked about."""

from __future__ import annotations

import os
import struct
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFile

from huoyan.errors import MediaError
from huoyan.media.arrays import array_to_rgb, tensor_to_array
from huoyan.media.decode import decode_picture, image_to_rgb, loaded_to_rgb, readable_errors
from huoyan.media.digest import digests_of
from huoyan.media.fetch import DEFAULT_POLICY, FetchPolicy, open_source, source_name
from huoyan.media.limits import DEFAULT_LIMITS, MediaLimits
from huoyan.media.types import Size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class Picture:
    """An image as 8-bit RGB that never changes.

    `pixels` is uint8 [height, width, 3], read-only. Two pictures are equal when their pixels are.
    """

    __slots__ = ("_digest", "_pixels")

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        """`pixels`: uint8 [height, width, 3], copied unless it is read-only. The rest is for `open`."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise MediaError(
                f"Picture(pixels) takes uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}; "
                "Picture.open takes the rest"
            )
        if pixels.flags.writeable or not pixels.flags.c_contiguous:
            pixels = np.array(pixels, order="C")
            pixels.flags.writeable = False
        self._pixels = pixels
        self._digest: bytes | None = None

    @classmethod
    def open(
        cls, source: Any, *, limits: MediaLimits = DEFAULT_LIMITS, policy: FetchPolicy = DEFAULT_POLICY
    ) -> Picture:
        """Open a picture from wherever it is.

        `source`: a path, a `file:`, `http(s):` or `data:` URL, bytes, a binary file, a PIL image, a NumPy
        array or a torch tensor ([height, width], [height, width, 1 | 3 | 4]; tensors also channels first;
        uint8, uint16, or floats within 0..1), or a Picture.

        Files (also a PIL image fresh from `Image.open`) are turned upright by their EXIF orientation; pixels
        already in memory are taken as they are. Transparent parts show white, 16 bits keep their high 8, an
        animation gives its first frame.

        `limits` bounds the pixels, checked before they are decoded; `policy` says what may be fetched. Raises
        MediaError with one line that names the source.
        """
        if isinstance(source, Picture):
            return source
        if isinstance(source, Image.Image):
            return cls(_from_pil(source, limits))
        if isinstance(source, np.ndarray):
            return cls(_from_array(source, "the array", limits))
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(source, torch.Tensor):
            return cls(_from_array(tensor_to_array(source), "the tensor", limits))
        if isinstance(source, str) and not source.strip():
            raise MediaError("a picture's path or URL is empty")
        if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) and not hasattr(
            source, "read"
        ):
            raise MediaError(
                f"a picture cannot be made from a {type(source).__name__}; "
                "give a path, URL, bytes, file, PIL image, array or tensor"
            )
        with open_source(source, policy) as opened:
            return cls(decode_picture(opened.file, opened.name, limits))

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [height, width, 3], read-only."""
        return self._pixels

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        height, width, _ = self._pixels.shape
        return width, height

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for the size and the pixels; computed on first use."""
        if self._digest is None:
            self.digest_together([self])
        assert self._digest is not None
        return self._digest

    @staticmethod
    def digest_together(pictures: Sequence[Picture]) -> None:
        """Compute the digests of several at once: those of small pictures, too, by all cores."""
        missing = [picture for picture in pictures if picture._digest is None]
        parts = [(struct.pack("<2Q", *picture.size), picture._pixels.data) for picture in missing]
        for picture, digest in zip(missing, digests_of(parts), strict=True):
            picture._digest = digest

    def to_pil(self) -> Image.Image:
        """A PIL image of the same pixels."""
        return Image.fromarray(self._pixels)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Picture):
            return NotImplemented
        return self.size == other.size and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Picture({self.width}x{self.height})"

    def __reduce__(self) -> tuple[type[Picture], tuple[NDArray[np.uint8]]]:
        return Picture, (self._pixels,)


def _from_pil(image: Image.Image, limits: MediaLimits) -> NDArray[np.uint8]:
    name = source_name(getattr(image, "filename", "") or "the PIL image")
    limits.check_size(image.size, name)
    with readable_errors(name):
        if isinstance(image, ImageFile.ImageFile) and not getattr(image, "is_animated", False):
            return loaded_to_rgb(image, name)
        return image_to_rgb(image, name)


def _from_array(array: NDArray[Any], name: str, limits: MediaLimits) -> NDArray[np.uint8]:
    if array.ndim >= 2 and 0 not in array.shape:
        limits.check_size((array.shape[1], array.shape[0]), name)
    return array_to_rgb(array, name)
