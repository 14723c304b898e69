"""The image processor against a second transcription that shares no code with it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import huoyan.tiny
from huoyan.errors import InputError, MediaError
from huoyan.vllm_plugin.image_processor import MiniCPMVImageProcessor
from tests.vllm_plugin.published import publish
from tests.vllm_plugin.reference import Reference

TINY = Path(huoyan.tiny.__file__).parent / "checkpoint"


def draw_size(rng: random.Random) -> tuple[int, int]:
    """Squares, strips and dots, small enough to be quick."""
    area = 10 ** rng.uniform(0, 5.3)
    ratio = 10 ** rng.uniform(-1.2, 1.2)
    return max(round((area * ratio) ** 0.5), 1), max(round((area / ratio) ** 0.5), 1)


def draw_picture(rng: random.Random, size: tuple[int, int] | None = None) -> Image.Image:
    width, height = size or draw_size(rng)
    return Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))


def draw_rules(rng: random.Random) -> Reference:
    return Reference(
        max_slice_nums=rng.randint(1, 12),
        scale_resolution=rng.choice((112, 196, 224)),
        patch_size=rng.choice((7, 14)),
        image_feature_size=rng.randint(1, 70),
        use_image_id=rng.random() < 0.5,
        norm_mean=(rng.random(), rng.random(), rng.random()),
        norm_std=(rng.uniform(0.1, 1), rng.uniform(0.1, 1), rng.uniform(0.1, 1)),
    )


def test_patches_grids_and_sizes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        rules = draw_rules(rng)
        processor = MiniCPMVImageProcessor(**vars(rules))
        prompts = [[draw_picture(rng) for _ in range(rng.randint(1, 2))] for _ in range(rng.randint(1, 2))]
        limit = rng.choice((None, rng.randint(1, 12)))
        found = processor.preprocess(prompts, max_slice_nums=limit)
        for i, pictures in enumerate(prompts):
            cuts = [cut for picture in pictures for cut in rules.slices(picture, limit)]
            assert len(found["pixel_values"][i]) == len(cuts)
            for patches, cut in zip(found["pixel_values"][i], cuts, strict=True):
                torch.testing.assert_close(patches, rules.patches(cut), rtol=0, atol=1e-5)
            sides = [[c.height // rules.patch_size, c.width // rules.patch_size] for c in cuts]
            assert found["tgt_sizes"][i].tolist() == sides
            assert [size.tolist() for size in found["image_sizes"][i]] == [list(p.size) for p in pictures]


def test_placeholders(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        rules = draw_rules(rng)
        processor = MiniCPMVImageProcessor(**vars(rules))
        size, number = draw_size(rng), rng.randint(0, 30)
        limit, numbered = rng.choice((None, rng.randint(1, 12))), rng.choice((None, True, False))
        assert processor.get_sliced_grid(size, limit) == rules.grid(size, limit)
        assert processor.get_slice_image_placeholder(
            size, number, max_slice_nums=limit, use_image_id=numbered
        ) == rules.placeholder(size, number, limit, numbered)


def test_without_slice_mode_nothing_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    picture = draw_picture(rng, (600, 300))
    processor = MiniCPMVImageProcessor(slice_mode=False)
    assert processor.get_sliced_grid(picture.size) is None
    assert len(processor.preprocess(picture)["pixel_values"][0]) == 1


def test_it_reads_the_folder(tmp_path: Path) -> None:
    folder = publish(TINY, tmp_path / "published")
    processor = MiniCPMVImageProcessor.from_pretrained(str(folder))
    assert processor.scale_resolution == 224
    assert processor.max_slice_nums == 9


@pytest.mark.parametrize("form", ["array", "tensor", "channels first", "video", "grey", "alpha"])
def test_forms_of_a_picture(seed: int, form: str) -> None:
    rng = random.Random(seed)
    picture = draw_picture(rng, (40, 30))
    array = np.array(picture)
    processor = MiniCPMVImageProcessor(scale_resolution=56)
    if form == "video":
        frames = np.stack([array, array[::-1]])
        found, expected = processor.preprocess([frames]), processor.preprocess([[array, array[::-1]]])
        assert len(found["image_sizes"][0]) == 2
    elif form == "grey":
        found = processor.preprocess(picture.convert("L"))
        expected = processor.preprocess(picture.convert("L").convert("RGB"))
    elif form == "alpha":
        # Half transparent on white.
        clear = picture.copy()
        clear.putalpha(128)
        found = processor.preprocess(clear)
        white = Image.new("RGB", picture.size, "white")
        expected = processor.preprocess(Image.composite(picture, white, clear.getchannel("A")))
    else:
        given = {
            "array": array,
            "tensor": torch.from_numpy(array),
            "channels first": torch.from_numpy(array).permute(2, 0, 1),
        }
        found, expected = processor.preprocess([given[form]]), processor.preprocess(picture)
    for one, other in zip(found["pixel_values"][0], expected["pixel_values"][0], strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_cut_is_one_line() -> None:
    processor = MiniCPMVImageProcessor()
    with pytest.raises(InputError, match="max_slice_nums"):
        processor.preprocess(Image.new("RGB", (9, 9)), max_slice_nums=0)
    with pytest.raises(MediaError, match="empty"):
        processor.get_slice_image_placeholder((0, 7))
    with pytest.raises(MediaError, match="a str"):
        processor.preprocess([["plane.jpg"]])
