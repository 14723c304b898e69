"""Pictures resized and cut by the kernels reach the encoder as those that Pillow cut: same patches, same embeddings."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from huoyan.engine import picture_encoder
from huoyan.engine.picture_encoder import PictureEncoder
from huoyan.engine.staging import Staging
from huoyan.media.originals import Originals
from huoyan.media.picture import Picture
from huoyan.media.prepare import prepare_picture
from huoyan.media.types import PreparedPicture, SliceRules
from huoyan.models.minicpmv import MiniCPMV
from tests.engine.support import tiny_model

RULES = SliceRules(scale_resolution=28, norm_mean=(0.48, 0.45, 0.4), norm_std=(0.27, 0.26, 0.28))


def model_on(device: torch.device, seed: int) -> MiniCPMV:
    model = tiny_model(seed)
    model.norm_mean, model.norm_std = RULES.norm_mean, RULES.norm_std
    return model.to(device)


def pictures(rng: random.Random, count: int) -> list[PreparedPicture]:
    """Some of one size as the frames of a video are, some cut on the host already."""
    noise = np.random.default_rng(rng.randrange(2**32))
    sizes = [(rng.randint(1, 90), rng.randint(1, 70)) for _ in range(2)]
    out = []
    for _ in range(count):
        width, height = rng.choice(sizes)
        picture = Picture(noise.integers(0, 256, (height, width, 3), np.uint8))
        originals = Originals() if rng.random() < 0.8 else None
        out.append(prepare_picture(picture, RULES, rng.choice([1, 4, 4]), originals))
    return out


@torch.inference_mode()
@pytest.mark.parametrize("most_bytes", [1, 6000, None])
def test_originals_give_the_embeddings_of_slices(
    seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch, most_bytes: int | None
) -> None:
    rng = random.Random(seed)
    model = model_on(device, seed)
    if most_bytes is not None:
        monkeypatch.setattr(picture_encoder, "LARGEST", most_bytes)
    encoder = PictureEncoder(model, rng.randint(1, 6), on_device=True)
    assert encoder.takes_originals
    assert encoder.runs_beside == (device.type == "cuda")
    for _ in range(2):
        some = pictures(rng, rng.randint(1, 4))
        got, ready = encoder.encode(some)
        if ready is not None:
            ready.wait()
        assert len(got) == len(some)
        for picture, embeddings in zip(some, got, strict=True):
            expected = model.encode_slices(picture.slices)
            assert embeddings.shape == expected.shape == (picture.num_slices, 5, 64)
            torch.testing.assert_close(embeddings, expected, rtol=2e-3, atol=2e-3)


@torch.inference_mode()
def test_packed_patches_are_exactly_those_of_the_host(seed: int, device: torch.device) -> None:
    rng = random.Random(seed)
    model = model_on(device, seed)
    seen: list[tuple[torch.Tensor, list[tuple[int, int]]]] = []
    inner = model.encode_patches
    model.encode_patches = lambda x, grids, *more: seen.append((x, list(grids))) or inner(x, grids, *more)  # type: ignore
    some = pictures(rng, 3)
    PictureEncoder(model, 100, on_device=True).encode(some)
    if device.type == "cuda":
        torch.cuda.synchronize()
    passes = len(seen)
    PictureEncoder(model, 100, on_device=False).encode(some)
    got, expected = (torch.cat([patches for patches, _ in some]) for some in (seen[:passes], seen[passes:]))
    got_grids, expected_grids = (
        [g for _, grids in some for g in grids] for some in (seen[:passes], seen[passes:])
    )
    assert sorted(got_grids) == sorted(expected_grids)
    # Slices of equal grids may stand in another order, and the host's are ordered within a pass.
    at = 0
    for grid in got_grids:
        rows = slice(at, at + grid[0] * grid[1])
        same = [expected[p : p + grid[0] * grid[1]] for p in _starts(expected_grids, grid)]
        assert any(torch.equal(got[rows], other) for other in same)
        at = rows.stop


@torch.inference_mode()
def test_small_passes_beside_decodes_give_what_large_ones_do(
    seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    model = model_on(device, seed)
    monkeypatch.setattr(picture_encoder, "BESIDE_PASS", rng.randint(1, 12))
    encoder = PictureEncoder(model, 32, on_device=True)
    packer = encoder._packer
    assert packer is not None
    patches, grids, _ = packer.pack(pictures(rng, 5))
    seen: list[int] = []
    inner = model.encode_patches
    model.encode_patches = lambda x, grids, *more: seen.append(len(x)) or inner(x, grids, *more)  # type: ignore
    together = encoder._encode(patches, grids, aside=False)
    large = len(seen)
    assert sum(seen) == len(patches)
    assert large == -(-len(grids) // picture_encoder.PASS_SLICES)
    torch.testing.assert_close(encoder._encode(patches, grids, aside=True), together, rtol=2e-3, atol=2e-3)
    assert sum(seen[large:]) == len(patches)
    largest = max(rows * columns for rows, columns in grids)
    assert max(seen[large:]) <= max(picture_encoder.BESIDE_PASS, largest)


@torch.inference_mode()
def test_a_picture_of_more_patches_than_a_pass_is_still_cut_on_the_device(
    seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    model = model_on(device, seed)
    picture = next(
        p for p in iter(lambda: pictures(rng, 1)[0], None) if p.original is not None and p.num_slices > 2
    )
    expected = model.encode_slices(picture.slices)
    monkeypatch.setattr(model, "encode_slices", lambda _: pytest.fail("the host has cut the picture"))
    most = max(picture.patches(model.config.vision.patch_size))
    got, ready = PictureEncoder(model, 32, most, on_device=True).encode([picture])
    if ready is not None:
        ready.wait()
    torch.testing.assert_close(got[0], expected, rtol=2e-3, atol=2e-3)


def _starts(grids: list[tuple[int, int]], wanted: tuple[int, int]) -> list[int]:
    ends = np.cumsum([0] + [rows * columns for rows, columns in grids]).tolist()
    return [start for start, grid in zip(ends, grids, strict=False) if grid == wanted]


def test_uploads_are_the_bytes_and_stay(seed: int, device: torch.device) -> None:
    rng = np.random.default_rng(seed)
    staging = Staging(device, 1000)
    held = []
    for _ in range(60):
        sizes = rng.integers(1, 500 if rng.random() < 0.9 else 1500, rng.integers(1, 4))
        arrays = [rng.integers(0, 256, int(n), np.uint8) for n in sizes]
        held.append((staging.upload(arrays), np.concatenate(arrays)))
    for got, expected in held:
        np.testing.assert_array_equal(got.cpu().numpy(), expected)
