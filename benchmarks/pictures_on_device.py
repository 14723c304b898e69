"""Pictures on their way to embeddings: prepared by the host or by the device, and through the encoder.

usage: python benchmarks/pictures_on_device.py [--small] [--device cuda|cpu] [--repeats 7] [--json OUT]

Prints milliseconds, the median of `--repeats`, for 1, 7, 10 and 40 slices (pictures of 448×448, 1344×896, 1344×1344,
and four of the last), a photo of 4000×3000 and 16 frames of 640×360:

  host        Pillow resizes and cuts in one thread, the patches are cut and sent, and normalised there
  device      the original is sent and the kernels do the rest; on a CPU the same in plain PyTorch
  least       what the device's part cannot be below: the upload at --upload GB/s, the memory's part at --memory TB/s
  encoder     patches to embeddings, launched kernel by kernel
  graph       the same captured (CUDA, small batches), else a dash
  least       its multiplications at --tflops

The encoder is of the full size in bfloat16 with random weights; `--small` takes one of three narrow layers, for a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HUOYAN_CUDA_KERNELS", "1")

import numpy as np
import torch

from huoyan.engine.encoder_graph import MOST_PATCHES, CudaCapture
from huoyan.engine.picture_encoder import PictureEncoder
from huoyan.layers.bicubic import agrees_with_pillow, resize_bicubic
from huoyan.media.originals import Originals
from huoyan.media.picture import Picture
from huoyan.media.prepare import prepare_picture
from huoyan.media.types import PreparedPicture, SliceRules
from huoyan.models.config import ModelConfig, TextConfig, VisionConfig
from huoyan.models.minicpmv import MiniCPMV
from huoyan.models.patches import Grid, cut_patches, normalise
from huoyan.models.siglip import PackedGrids
from huoyan.models.weights import fill_random

RULES = SliceRules()
# name, sizes, max_slice_nums
CASES = (
    ("448x448", [(448, 448)], None),
    ("1344x896", [(1344, 896)], None),
    ("1344x1344", [(1344, 1344)], None),
    ("4 of 1344x1344", [(1344, 1344)] * 4, None),
    ("4000x3000", [(4000, 3000)], None),
    ("16 of 640x360", [(640, 360)] * 16, 2),
)


def build(small: bool, device: torch.device) -> MiniCPMV:
    """The encoder and the resampler; of the decoder hardly anything."""
    width = 256 if small else 3584
    text = TextConfig(width, 64, 1, 2, 1, 64, 64, width // 2)
    vision = VisionConfig(144, 288, 3, 2, 980, 14) if small else VisionConfig(1152, 4304, 27, 16, 980, 14)
    with torch.device("meta"):
        model = MiniCPMV(ModelConfig("2.6", text, vision, 64))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    fill_random(model, device, dtype, seed=0)
    return model.eval()


def operations(model: MiniCPMV, grids: list[Grid]) -> float:
    """Multiplications and additions of the encoder and the resampler, two for each product."""
    vision, width, queries = model.config.vision, model.config.text.hidden_size, model.config.query_num
    patches = sum(rows * columns for rows, columns in grids)
    squares = sum((rows * columns) ** 2 for rows, columns in grids)
    wide, deep = vision.hidden_size, vision.intermediate_size
    layer = patches * (4 * wide**2 + 2 * wide * deep) + 2 * squares * wide
    resampler = patches * (wide * width + 2 * width**2 + 2 * queries * width)
    ends = len(grids) * queries * 3 * width**2 + patches * 588 * wide
    return 2 * (vision.num_encoder_layers * layer + resampler + ends)


def median_ms(run, repeats: int, device: torch.device) -> float:
    def once() -> float:
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) * 1000

    once(), once()
    return sorted(once() for _ in range(repeats))[repeats // 2]


def prepare_on_host(pictures: list[Picture], limit: int | None, model: MiniCPMV):
    slices = [s for p in pictures for s in prepare_picture(p, RULES, limit).slices]
    pixels, grids = cut_patches(slices, 14)
    sent = torch.from_numpy(pixels).to(model.device)
    return normalise(sent, model.norm_mean, model.norm_std, model.dtype), grids


def prepare_plainly(prepared: list[PreparedPicture], model: MiniCPMV) -> None:
    """The device's way on a CPU: the same integers, without the kernels."""
    for picture in prepared:
        assert picture.original is not None
        plan, pixels = picture.plan, torch.from_numpy(picture.original.copy())
        resize_bicubic(pixels, *plan.overview)
        if plan.cell is not None and plan.grid is not None:
            resize_bicubic(pixels, plan.cell[0] * plan.grid[0], plan.cell[1] * plan.grid[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--upload", type=float, default=50.0, help="GB/s from pinned memory (50)")
    parser.add_argument("--memory", type=float, default=4.2, help="TB/s of the device's memory (4.2)")
    parser.add_argument("--tflops", type=float, default=790.0, help="bf16 matrix products (790)")
    parser.add_argument("--json")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    if not agrees_with_pillow():
        parser.error("this Pillow resizes otherwise than the tables do: nothing to compare")
    model = build(args.small, device)
    rng = np.random.default_rng(0)
    rows: dict[str, dict[str, float | None]] = {}
    heads = ("host", "device", "least", "encoder", "graph", "least")
    print(f"{'':18}{'slices':>7}" + "".join(f"{head:>10}" for head in heads))
    with torch.inference_mode():
        for name, sizes, limit in CASES:
            pictures = [Picture(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
            originals = [prepare_picture(p, RULES, limit, Originals(excess=1 << 30)) for p in pictures]
            patches, grids = prepare_on_host(pictures, limit, model)
            host = median_ms(lambda: prepare_on_host(pictures, limit, model), args.repeats, device)  # noqa: B023
            if on_gpu:
                packer = PictureEncoder(model, 1000, on_device=True)._packer
                assert packer is not None
                mine = median_ms(lambda: packer.pack(originals), args.repeats, device)  # noqa: B023
            else:
                mine = median_ms(lambda: prepare_plainly(originals, model), args.repeats, device)  # noqa: B023
            sent = sum(p.pixels.nbytes for p in pictures)
            # Each pixel of the original is read at least once, each value of a patch written once.
            moved = sent + patches.nbytes
            least = (sent / args.upload / 1e9 + moved / args.memory / 1e12) * 1000 if on_gpu else None
            packed = PackedGrids(sorted(grids))
            encoder = median_ms(lambda: model.encode_patches(patches, packed), args.repeats, device)  # noqa: B023
            graph = None
            if on_gpu and len(patches) <= MOST_PATCHES:
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    captured = CudaCapture(model)(packed)
                    graph = median_ms(lambda: captured.replay(patches), args.repeats, device)  # noqa: B023
            floor = operations(model, grids) / args.tflops / 1e12 * 1000 if on_gpu else None
            values = (host, mine, least, encoder, graph, floor)
            rows[name] = dict(
                zip(
                    ("host", "device", "device_least", "encoder", "graph", "encoder_least"),
                    values,
                    strict=True,
                )
            )
            shown = "".join(f"{value:>10.2f}" if value is not None else f"{'-':>10}" for value in values)
            print(f"{name:18}{len(grids):>7}{shown}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
