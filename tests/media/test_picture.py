"""Opening pictures of every kind, and refusing what is none, each in one clear line."""

from __future__ import annotations

import base64
import gc
import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from huoyan.errors import InputError, MediaError
from huoyan.media.fetch import FetchPolicy
from huoyan.media.limits import MediaLimits
from huoyan.media.picture import Picture

RNG = np.random.default_rng(20)
RGB = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


LOSSLESS = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "PPM": {},
    "WEBP": {"lossless": True},
}


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats_give_back_their_pixels(format: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(RGB), format, **LOSSLESS[format])
    path = tmp_path / "名字 with space.bin"
    path.write_bytes(data)
    url = f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"
    with open(path, "rb") as file:
        file.read(5)
        for source in (str(path), path, path.as_uri(), data, bytearray(data), url, file, io.BytesIO(data)):
            picture = Picture.open(source)
            np.testing.assert_array_equal(picture.pixels, RGB)
            assert picture.size == (53, 37)
        assert not file.closed


@pytest.mark.parametrize("format", ["JPEG", "AVIF", "GIF", "WEBP"])
def test_lossy_formats_decode_as_pillow_does(format: str) -> None:
    data = encoded(Image.fromarray(RGB), format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(Picture.open(data).pixels, expected)


def test_equality_digest_and_immutability() -> None:
    a, b = Picture.open(RGB), Picture.open(Image.fromarray(RGB))
    assert a == b
    assert hash(a) == hash(b)
    assert Picture.open(a) is a
    assert a != Picture.open(RGB[:, ::-1])
    assert a != Picture.open(RGB.reshape(53, 37, 3))
    assert a != RGB.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        a.pixels[0, 0, 0] = 1
    mine = RGB.copy()
    c = Picture.open(mine)
    mine[:] = 0
    assert c == a
    copy = pickle.loads(pickle.dumps(a))
    assert copy == a
    assert not copy.pixels.flags.writeable
    np.testing.assert_array_equal(np.asarray(a.to_pil()), RGB)
    assert repr(a) == "Picture(53x37)"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_turns_files_upright(orientation: int, format: str) -> None:
    upright = np.zeros((40, 60, 3), dtype=np.uint8)
    upright[:20, :30] = (250, 0, 0)
    upright[20:, :30] = (0, 250, 0)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = (
        {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    )
    data = encoded(Image.fromarray(np.ascontiguousarray(undo(upright))), format, exif=exif, **options)
    for source in (data, Image.open(io.BytesIO(data))):
        picture = Picture.open(source)
        assert picture.size == (60, 40)
        difference = np.abs(picture.pixels.astype(int) - upright)
        assert np.median(difference) <= 3
        assert difference[5, 5].max() < 12
        assert difference[35, 5].max() < 12


def test_pixels_in_memory_are_not_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(RGB), "PNG", exif=exif)
    assert Picture.open(data).size == (37, 53)
    assert Picture.open(Image.open(io.BytesIO(data)).convert("RGB")).size == (53, 37)


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01\x12")
    script = (
        "import sys\nfrom huoyan.media.picture import Picture\nprint(Picture.open(sys.stdin.buffer.read()))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", script], input=data, capture_output=True, env=env, check=False
    )
    assert run.stdout == b"Picture(53x37)\n"
    assert run.stderr == b""


def test_palette_and_transparency() -> None:
    palette = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(Picture.open(palette).pixels, np.asarray(palette.convert("RGB")))
    gif = encoded(palette, "GIF", transparency=palette.getpixel((0, 0)))
    assert tuple(Picture.open(gif).pixels[0, 0]) == (255, 255, 255)
    png = encoded(Image.fromarray(RGB), "PNG", transparency=tuple(int(v) for v in RGB[3, 4]))
    assert tuple(Picture.open(png).pixels[3, 4]) == (255, 255, 255)
    assert tuple(Picture.open(png).pixels[4, 4]) == tuple(RGB[4, 4])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_shows_white(mode: str) -> None:
    rgba = np.zeros((4, 6, 4), dtype=np.uint8)
    rgba[:, :2, 3] = 255
    rgba[:, 2:4, 3] = 51
    image = Image.fromarray(rgba)
    if mode == "PA":
        image = image.convert("LA").convert("PA")
        image.putalpha(Image.fromarray(rgba[:, :, 3]))
    elif mode == "La":
        image = image.convert("LA").convert("La")
    else:
        image = image.convert(mode)
    pixels = Picture.open(image).pixels
    assert tuple(pixels[0, 0]) == (0, 0, 0)
    assert tuple(pixels[0, 2]) == (204, 204, 204)
    assert tuple(pixels[0, 5]) == (255, 255, 255)
    if mode == "RGBA":
        np.testing.assert_array_equal(Picture.open(rgba).pixels, pixels)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "1", "L"])
def test_other_modes_convert_as_pillow_does(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    np.testing.assert_array_equal(Picture.open(image).pixels, np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_and_lab_tiff() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixel = Picture.open(encoded(red, "JPEG", quality=95)).pixels[4, 4]
    assert pixel[0] > 240
    assert pixel[1:].max() < 15
    lab = Image.new("LAB", (8, 8), (138, 80 + 128, 67 + 128))
    pixel = Picture.open(lab).pixels[4, 4]
    assert pixel[0] > 200
    assert pixel[1:].max() < 90


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    data = encoded(Image.fromarray(values), format)
    pixels = Picture.open(data).pixels
    np.testing.assert_array_equal(pixels[:, :, 0], values >> 8)
    np.testing.assert_array_equal(pixels[:, :, 0], pixels[:, :, 2])
    np.testing.assert_array_equal(Picture.open(values).pixels, pixels)


def test_sixteen_bit_big_endian() -> None:
    values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    image = Image.frombytes("I;16B", (40, 30), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(Picture.open(image).pixels[:, :, 1], values >> 8)


def test_wide_integers_and_floats() -> None:
    f = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_array_equal(Picture.open(Image.fromarray(f)).pixels[:, :, 0].ravel(), np.arange(256))
    stretched = Picture.open(encoded(Image.fromarray(f * 900 - 100), "TIFF")).pixels
    assert (stretched.min(), stretched.max()) == (0, 255)
    wide = np.array([[-5, 2**30], [2**29, 0]], dtype=np.int32)
    pixels = Picture.open(Image.fromarray(wide)).pixels[:, :, 0]
    assert (pixels[0, 0], pixels[0, 1], pixels[1, 0]) == (0, 255, 128)
    nan = np.array([[np.nan, 1.0], [0.0, 0.5]], dtype=np.float32)
    assert Picture.open(Image.fromarray(nan)).pixels[0, 0, 0] == 0


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_first_frame_of_an_animation(format: str) -> None:
    red, blue = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 255))
    pixel = Picture.open(encoded(red, format, save_all=True, append_images=[blue])).pixels[5, 5]
    assert pixel[0] > 240
    assert pixel[2] < 15


def test_strips_one_pixel_wide() -> None:
    for size in ((1, 9000), (9000, 1), (1, 1)):
        assert Picture.open(encoded(Image.new("RGB", size, (9, 8, 7)), "PNG")).size == size


# ---- arrays and tensors


def test_arrays() -> None:
    grey = RGB[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, 2)
    for array in (grey, grey[:, :, None], grey.astype(np.int64), grey.astype(np.uint16) << 8):
        np.testing.assert_array_equal(Picture.open(array).pixels, expected)
    for dtype in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(Picture.open((RGB / 255).astype(dtype)).pixels, RGB)
    np.testing.assert_array_equal(Picture.open(grey > 99).pixels, np.where(expected > 99, 255, 0))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 20, 30), np.uint8), "move the channels last"),
        (np.zeros((5,), np.uint8), r"shape \[5\]"),
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.full((4, 4), 3.0), r"within 0\.\.1"),
        (np.full((4, 4), np.nan), r"within 0\.\.1"),
        (np.full((4, 4), -1), r"within 0\.\.255"),
        (np.full((4, 4), "x"), "dtype"),
        (np.full((4, 4), 1j), "dtype"),
    ],
)
def test_bad_arrays(array: np.ndarray, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        Picture.open(array)


def test_tensors() -> None:
    torch = pytest.importorskip("torch")
    last, first = torch.from_numpy(RGB.copy()), torch.from_numpy(RGB.copy()).permute(2, 0, 1)
    for tensor in (last, first, first / 255, (first / 255).double().requires_grad_()):
        np.testing.assert_array_equal(Picture.open(tensor).pixels, RGB)
    np.testing.assert_array_equal(Picture.open(first[0]).pixels[:, :, 1], RGB[:, :, 0])


def test_constructor_refuses_other_arrays() -> None:
    for bad in (RGB / 255, RGB[:, :, 0], RGB[:0]):
        with pytest.raises(MediaError, match=r"Picture\.open"):
            Picture(bad)


# ---- limits


def bomb_png(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its data has."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


def test_the_limit_is_checked_before_decoding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in ((20_000, 15_000), (65_535, 65_535)):
            with pytest.raises(MediaError, match="over the limit of 200 million"):
                Picture.open(bomb_png(*size))
        # Within the limit here, above Pillow's own: no warning, and the damage is what is reported.
        with pytest.raises(MediaError, match="damaged"):
            Picture.open(bomb_png(12_000, 10_000))
    assert Image.MAX_IMAGE_PIXELS is not None
    assert Image.MAX_IMAGE_PIXELS < 100_000_000


def test_pillows_own_limit_is_back_after_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    before = Image.MAX_IMAGE_PIXELS
    data = encoded(Image.fromarray(RGB), "PNG")
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(Picture.open, [data] * 64))) == 1
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_can_be_lowered_and_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (50, 40)), "PNG")
    with pytest.raises(MediaError, match="max_pixels"):
        Picture.open(data, limits=MediaLimits(max_pixels=1999))
    assert Picture.open(data, limits=MediaLimits(max_pixels=2000)).size == (50, 40)
    monkeypatch.setenv("HUOYAN_MAX_PIXELS", "1e3")
    for source in (data, np.zeros((40, 50), np.uint8), Image.new("L", (50, 40))):
        with pytest.raises(MediaError, match="HUOYAN_MAX_PIXELS"):
            Picture.open(source)
    assert Picture.open(data, limits=MediaLimits(max_pixels=2000)).size == (50, 40)
    monkeypatch.setenv("HUOYAN_MAX_PIXELS", "many")
    with pytest.raises(InputError, match="HUOYAN_MAX_PIXELS='many'"):
        Picture.open(data)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_refused_bomb_costs_no_memory() -> None:
    script = (
        "import sys, resource\n"
        "from huoyan.media.picture import Picture\n"
        "from huoyan.errors import MediaError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    Picture.open(sys.stdin.buffer.read())\nexcept MediaError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", script],
        input=bomb_png(60_000, 60_000),
        capture_output=True,
        env=env,
        check=True,
    )
    assert int(run.stdout) < 20_000


def test_scan_of_a_hundred_megapixels() -> None:
    scan = Image.new("L", (10_000, 10_000), 200)
    scan.putpixel((9_999, 9_999), 3)
    data = encoded(scan, "PNG", compress_level=1)
    del scan
    picture = Picture.open(data)
    assert picture.size == (10_000, 10_000)
    assert tuple(picture.pixels[-1, -1]) == (3, 3, 3)
    del picture
    gc.collect()


# ---- what is no picture


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"hello there, this is text", "begins with"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"\0\0\0\x20ftypisom....", "video"),
        (b"\0\0\0\x20ftypheic....", "HEIC"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x80\x04\x95pickle", "begins with"),
    ],
)
def test_files_that_are_no_pictures(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "thing.png"
    path.write_bytes(data)
    with pytest.raises(MediaError, match=words) as caught:
        Picture.open(path)
    assert "thing.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_sources_that_do_not_work(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (str(tmp_path / "none.jpg"), "no such file"),
        (tmp_path, "is a folder"),
        ("", "empty"),
        ("a\0b.png", "cannot be opened"),
        ("new\nline.png", r"new\?line"),
        ("ftp://example.org/a.png", "ftp: URLs"),
        ("file://host/a.png", "must not name a host"),
        ("data:image/png", "no comma"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,AAA", "not valid base64"),
        (3, "from a int"),
        (None, "from a NoneType"),
        ([], "from a list"),
        (io.StringIO("text"), "binary mode"),
    ]
    for source, words in cases:
        with pytest.raises(MediaError, match=words) as caught:
            Picture.open(source)
        assert "\n" not in str(caught.value)


def test_percent_encoded_data_url() -> None:
    from urllib.parse import quote

    data = encoded(Image.fromarray(RGB), "PNG")
    np.testing.assert_array_equal(Picture.open(f"data:image/png,{quote(data)}").pixels, RGB)


def test_pipes_are_read_within_the_limit(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(RGB), "PNG")
    for limit, works in ((len(data), True), (len(data) - 1, False)):
        reader, writer = os.pipe()
        with os.fdopen(writer, "wb") as sink:
            sink.write(data)
        with os.fdopen(reader, "rb") as pipe:
            if works:
                picture = Picture.open(pipe, policy=FetchPolicy(max_bytes=limit))
                np.testing.assert_array_equal(picture.pixels, RGB)
            else:
                with pytest.raises(MediaError, match="larger than"):
                    Picture.open(pipe, policy=FetchPolicy(max_bytes=limit))
    with pytest.raises(MediaError, match="larger than"):
        Picture.open("/dev/zero", policy=FetchPolicy(max_bytes=1 << 20))


SAMPLES = {
    format: encoded(Image.fromarray(RGB), format)
    for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "AVIF")
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(format=st.sampled_from(sorted(SAMPLES)), data=st.data())
def test_truncated_files_give_one_line_or_a_picture(format: str, data: st.DataObject) -> None:
    whole = SAMPLES[format]
    check_damaged(whole[: data.draw(st.integers(0, len(whole) - 1))])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    format=st.sampled_from(sorted(SAMPLES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_files_give_one_line_or_a_picture(format: str, flips: list[tuple[float, int]]) -> None:
    data = bytearray(SAMPLES[format])
    for place, value in flips:
        data[int(place**3 * len(data))] = value
    check_damaged(bytes(data))


def check_damaged(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            picture = Picture.open(data, limits=MediaLimits(max_pixels=4_000_000))
        except MediaError as error:
            message = str(error)
        else:
            message = "bytes given"
            assert picture.pixels.dtype == np.uint8
            assert picture.pixels.shape[2] == 3
    assert "\n" not in message
    assert "bytes given" in message


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"])
def test_half_a_file_is_refused(format: str) -> None:
    with pytest.raises(MediaError, match="damaged or cut short"):
        Picture.open(SAMPLES[format][: len(SAMPLES[format]) // 2])
