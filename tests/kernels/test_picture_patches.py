"""The kernels that resize and cut pictures, against Pillow and plain PyTorch, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from huoyan.kernels.picture_patches import Cut, ResizeTables, picture_patches, picture_patches_reference
from huoyan.media.slicing import cut_slices, plan_slices
from huoyan.media.types import SlicePlan, SliceRules
from huoyan.models.patches import cut_patches, normalise, normalised_bytes

PATCH = 14


def cuts(plan: SlicePlan) -> list[Cut]:
    whole = [] if plan.cell is None or plan.grid is None else [Cut(plan.cell, plan.grid)]
    return [Cut(plan.overview), *whole]


def side(rng: np.random.Generator) -> int:
    return int(rng.choice([1, int(rng.integers(2, 20)), int(rng.integers(2, 130))]))


def test_the_bytes_are_pillow_s(seed: int, device: torch.device) -> None:
    rng = np.random.default_rng(seed)
    rules = SliceRules(scale_resolution=28)
    same = torch.arange(256, dtype=torch.uint8, device=device).repeat(3, 1)
    tables = ResizeTables(device, most=5)
    for _ in range(8 if device.type == "cpu" else 300):
        count, width, height = int(rng.integers(1, 4)), side(rng), side(rng)
        pictures = rng.integers(0, 256, (count, height, width, 3), np.uint8)
        plan = plan_slices((width, height), rules, int(rng.integers(1, 7)))
        slices = [s for rgb in pictures for s in cut_slices(rgb, plan)]
        expected, grids = cut_patches(slices, PATCH)
        ends = np.cumsum([0] + [rows * columns for rows, columns in grids])
        # The slices lie in any order, and rows that belong to others stay as they are.
        spare = int(rng.integers(0, 9))
        order = rng.permutation(len(grids))
        starts = np.empty(len(grids), np.int32)
        starts[order] = spare + np.cumsum([0, *np.diff(ends)[order]])[:-1]
        out = torch.full((spare + len(expected), 3 * PATCH**2), 7, dtype=torch.uint8, device=device)
        on_device = torch.from_numpy(pictures).to(device)
        per_picture = starts.reshape(count, -1)
        for cut, rows in zip(cuts(plan), (per_picture[:, :1], per_picture[:, 1:]), strict=False):
            first = torch.from_numpy(rows.reshape(-1).copy()).to(device)
            picture_patches(on_device, cut, PATCH, same, first, out, tables)
        got = out.cpu().numpy()
        assert (got[:spare] == 7).all()
        for i, start in enumerate(starts):
            rows = got[start : start + ends[i + 1] - ends[i]]
            np.testing.assert_array_equal(rows, expected[ends[i] : ends[i + 1]], f"{width}x{height} {plan}")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size", [(1344, 896), (896, 1344), (1080, 2400), (4000, 3000), (640, 360), (5, 9000), (4500, 4500)]
)
def test_pictures_of_real_sizes(seed: int, device: torch.device, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    plan = plan_slices(size, SliceRules())
    rgb = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    expected, grids = cut_patches(cut_slices(rgb, plan), PATCH)
    starts = np.cumsum([0] + [rows * columns for rows, columns in grids[:-1]]).astype(np.int32)
    first = torch.from_numpy(starts).to(device)
    same = torch.arange(256, dtype=torch.uint8, device=device).repeat(3, 1)
    out = torch.empty(expected.shape, dtype=torch.uint8, device=device)
    pixels = torch.from_numpy(rgb[None]).to(device)
    for cut, rows in zip(cuts(plan), (first[:1], first[1:]), strict=False):
        picture_patches(pixels, cut, PATCH, same, rows.contiguous(), out, ResizeTables(device))
    np.testing.assert_array_equal(out.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_says_the_same(seed: int, device: torch.device, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    values = normalised_bytes(mean, std, dtype, device)
    tables = ResizeTables(device)
    for _ in range(3):
        pixels = torch.from_numpy(rng.integers(0, 256, (2, side(rng), side(rng), 3), np.uint8)).to(device)
        cut = Cut((14 * int(rng.integers(1, 4)), 14 * int(rng.integers(1, 4))), (int(rng.integers(1, 3)), 2))
        cells = 2 * cut.grid[0] * cut.grid[1]
        each = cut.cell[0] * cut.cell[1] // PATCH**2
        first = (each * torch.from_numpy(rng.permutation(cells))).int().to(device)
        out, expected = (
            torch.zeros(cells * each, 3 * PATCH**2, dtype=dtype, device=device) for _ in range(2)
        )
        picture_patches(pixels, cut, PATCH, values, first, out, tables)
        picture_patches_reference(pixels, cut, PATCH, values, first, expected)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalised_bytes_are_what_normalise_gives(
    seed: int, device: torch.device, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    mean, std = rng.uniform(0.3, 0.6, 3).tolist(), rng.uniform(0.2, 0.6, 3).tolist()
    pixels = torch.from_numpy(rng.integers(0, 256, (5, 3 * 49), np.uint8)).to(device)
    values = normalised_bytes(mean, std, dtype, device)
    expected = normalise(pixels, mean, std, dtype).view(5, 3, 49)
    for channel in range(3):
        got = values[channel][pixels.view(5, 3, 49)[:, channel].long()]
        assert torch.equal(got, expected[:, channel])


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from huoyan.kernels import picture_patches as kernels

pointers = {"in_ptr": "*u8", "first_ptr": "*i32", "weights_ptr": "*i32", "rows_ptr": "*i32"}
constants = {"ROUND": 1 << 21, "BITS": 22, "BLOCK": 1024}
for kernel, out, more in (
    (kernels._resample_kernel, "*u8", {}),
    (kernels._patches_kernel, "*bf16", {"ALONG_WIDTH": True, "PATCH": 14}),
    (kernels._patches_kernel, "*bf16", {"ALONG_WIDTH": False, "PATCH": 14}),
):
    values = {**constants, **more}
    kinds = {**pointers, "out_ptr": out, "values_ptr": out, **dict.fromkeys(values, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    compiled = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
"""


def test_they_compile_for_a_hopper_gpu_without_one(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
