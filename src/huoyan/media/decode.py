"""From an encoded picture to 8-bit RGB, the way a viewer shows it.

Upright (EXIF orientation), on white (alpha), first frame (animations), first page (TIFF). The size is
checked from the header before any pixel is decoded.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageFile

from huoyan.errors import HuoyanError, MediaError
from huoyan.media.limits import MediaLimits

if TYPE_CHECKING:
    from numpy.typing import NDArray

READABLE = "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF"

# Pillow warns of untidy metadata in pictures that decode well. Last in the list: a caller's own filters win.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.", append=True)

_HEIC = (b"heic", b"heix", b"hevc", b"mif1")
_HINTS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda head: not head, "it is empty"),
    (
        lambda head: head[4:8] == b"ftyp" and head[8:12] in _HEIC,
        "it is HEIC: convert it",
    ),
    (lambda head: head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3", "it is a video: give it as one"),
    (lambda head: head.startswith(b"%PDF"), "it is a PDF: convert its pages to pictures"),
    (lambda head: head.lstrip()[:5].lower() in (b"<!doc", b"<html"), "it is a web page"),
    (lambda head: head.lstrip()[:4].lower() in (b"<svg", b"<?xm"), "it is SVG or XML: convert it"),
    (lambda head: head.startswith(b"version https://git-lfs"), "it is a Git LFS pointer: run git lfs pull"),
)


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with `head` (64 bytes suffice) is a picture or an animation of pictures."""
    return _sniff(head) is not None


def decode_picture(file: BinaryIO, name: str, limits: MediaLimits) -> NDArray[np.uint8]:
    """Decode `file` (seekable, at its beginning) to uint8 [height, width, 3], read-only.

    Raises MediaError naming the file: not a picture, truncated, broken, over the limit.
    """
    with opened_image(file, name, limits) as image:
        return loaded_to_rgb(image, name)


@contextmanager
def opened_image(file: BinaryIO, name: str, limits: MediaLimits) -> Iterator[ImageFile.ImageFile]:
    """The picture's header, read and checked; pixels are decoded inside the block, errors made readable."""
    with _pillow_guard(limits.allowed_pixels()), readable_errors(name):
        head = file.read(64)
        file.seek(0)
        image = _open(file, head, name)
        with image:
            limits.check_size(image.size, name)
            yield image


@contextmanager
def readable_errors(name: str, kind: str = "picture") -> Iterator[None]:
    """Whatever a decoder says about broken data, in one line that names the file."""
    try:
        yield
    except HuoyanError:
        raise
    except MemoryError:
        raise MediaError(f"{name}: not enough memory to decode it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(f"{name}: one of its frames or tiles is over the limit of pixels") from None
    except Exception as error:
        # Pillow's plugins and PyAV raise a dozen unrelated types on malformed data, without a common base.
        text = " ".join(str(error).split())[:120] or type(error).__name__
        raise MediaError(f"{name}: the {kind} is damaged or cut short ({text})") from None


def loaded_to_rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Decode the frame a file stands at, turn it upright, bring it to RGB."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image_to_rgb(image if turn is None else image.transpose(turn), name)


def image_to_rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Any mode of Pillow to uint8 [height, width, 3], read-only. Transparent parts show white."""
    mode = image.mode
    if mode.startswith("I;16"):
        return _grey(_high_byte(image))
    if mode == "I":
        return _grey(_from_integers(np.asarray(image)))
    if mode == "F":
        return _grey(_from_floats(np.asarray(image)))
    if mode == "LAB":
        return _frozen(_from_lab(image))
    if mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = _on_white(image.convert("RGBA"))
    try:
        return _frozen(image.convert("RGB"))
    except ValueError:
        raise MediaError(f"{name}: Pillow's mode {mode} is not read; convert it to RGB") from None


def _open(file: BinaryIO, head: bytes, name: str) -> ImageFile.ImageFile:
    plugin = _sniff(head)
    if plugin is None:
        hint = next((text for test, text in _HINTS if test(head)), f"it begins with {head[:8]!r}")
        raise MediaError(f"{name}: not a picture that can be read ({READABLE}); {hint}")
    try:
        importlib.import_module(f"PIL.{plugin}ImagePlugin")
        # The factory is what Image.open calls; calling it directly leaves out Pillow's own check, whose
        # warning would reach the user where the limit here is higher.
        factory, _ = Image.OPEN[{"Jpeg": "JPEG", "WebP": "WEBP"}.get(plugin, plugin.upper())]
    except (ImportError, KeyError):
        raise MediaError(f"{name}: this Pillow does not read {plugin}; upgrade Pillow") from None
    return factory(file, name)


def _sniff(head: bytes) -> str | None:
    """The plugin's name, from the first bytes: a file's ending says nothing for sure."""
    if head.startswith(b"\xff\xd8\xff"):
        return "Jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "Png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "Gif"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "Tiff"
    if head[:1] == b"P" and head[1:2] in b"123456fF" and head[2:3] in b" \t\r\n":
        return "Ppm"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "Avif"
    if head[4:8] == b"ftyp" and head[8:12] == b"mif1" and b"avif" in head[16:64]:
        return "Avif"
    return "Bmp" if head[:2] == b"BM" else None


# ---- Pillow's own limit on pixels

_guard_lock = threading.Lock()
_guard_depth = 0
_guard_saved: int | None = None


@contextmanager
def _pillow_guard(allowed: int) -> Iterator[None]:
    """Where the limit here is the higher one, Pillow's must not stop a plugin that checks half way."""
    global _guard_depth, _guard_saved
    with _guard_lock:
        if _guard_depth == 0:
            _guard_saved = Image.MAX_IMAGE_PIXELS
        _guard_depth += 1
        if Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, allowed)
    try:
        yield
    finally:
        with _guard_lock:
            _guard_depth -= 1
            if _guard_depth == 0:
                Image.MAX_IMAGE_PIXELS = _guard_saved


# ---- EXIF

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        # The pixels are good even where the camera's notes about them are not.
        return 1
    return value if isinstance(value, int) else 1


# ---- modes


def _frozen(image: Image.Image) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.asarray(image)
    pixels.flags.writeable = False
    return pixels


def _grey(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pixels = np.repeat(grey[:, :, None], 3, axis=2)
    pixels.flags.writeable = False
    return pixels


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _high_byte(image: Image.Image) -> NDArray[np.uint8]:
    """16-bit grey as 16-bit colour is read: Pillow keeps the high byte of each colour."""
    values = np.asarray(image if image.mode == "I;16" else image.convert("I"))
    return (values >> 8).astype(np.uint8)


def _from_integers(values: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Pillow reads some 16-bit files as 32-bit integers; anything wider is stretched over its own range."""
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high <= 0xFFFF:
        return (values >> 8).astype(np.uint8)
    return _stretch(values.astype(np.float64), float(low), float(high))


def _from_floats(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0..1 is black to white; anything else is stretched over its own range. Not-a-numbers are black."""
    values = np.nan_to_num(values, nan=0.0, posinf=np.finfo(np.float32).max, neginf=np.finfo(np.float32).min)
    low, high = float(values.min()), float(values.max())
    if low >= 0.0 and high <= 1.0:
        low, high = 0.0, 1.0
    return _stretch(values.astype(np.float64), low, high)


def _stretch(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    span = (high - low) or 1.0
    return np.rint((values - low) * (255.0 / span)).astype(np.uint8)


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    return converted if converted is not None else image
