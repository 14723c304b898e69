"""The slicing rules, against a second transcription that shares no code with the first."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from huoyan.errors import InputError, MediaError, ModelError
from huoyan.media.picture import Picture
from huoyan.media.prepare import prepare_items, prepare_picture
from huoyan.media.slicing import MAX_SLICE_GROWTH, cut_slices, plan_slices, read_slice_rules
from huoyan.media.types import MediaItem, SlicePlan, SliceRules

RULES = SliceRules()


def half_even(x: float, unit: int) -> int:
    """round(x / unit) by exact arithmetic on the quotient's double, ties to even, at least one unit."""
    q = Fraction(x / unit)
    whole, rest = divmod(q, 1)
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1):
        whole += 1
    return max(int(whole) * unit, unit)


def reference_best(w: float, h: float, s: int, p: int, upscale: bool) -> tuple[int, int]:
    if upscale or w * h > s * s:
        r = w / h
        h = math.floor(s / math.sqrt(r))
        w = math.floor(h * r)
    return half_even(w, p), half_even(h, p)


def reference_plan(w: int, h: int, rules: SliceRules, n: int) -> SlicePlan:
    s, p = rules.scale_resolution, rules.patch_size
    if not rules.slice_mode:
        n = 1
    needed = -((-w * h) // (s * s))
    multiple = min(needed, n)
    if multiple <= 1:
        return SlicePlan(reference_best(w, h, s, p, True))
    best, best_error = None, math.inf
    for count in [multiple - 1, multiple, multiple + 1]:
        if count == 1 or count > n:
            continue
        for cols in range(1, count + 1):
            if count % cols:
                continue
            rows = count // cols
            error = abs(math.log(w / h) - math.log(cols / rows))
            if error < best_error:
                best, best_error = (cols, rows), error
    assert best is not None
    cell_w, cell_h = half_even(w, best[0]) / best[0], half_even(h, best[1]) / best[1]
    return SlicePlan(reference_best(w, h, s, p, False), best, reference_best(cell_w, cell_h, s, p, True))


def random_size(rng: random.Random) -> tuple[int, int]:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randint(1, 40), rng.randint(1, 40)
    if kind == 1:
        return rng.randint(1, 2000), rng.randint(1, 2000)
    if kind == 2:  # sizes about the borders of the rules
        return 14 * rng.randint(1, 200) + rng.randint(-1, 1) or 1, 14 * rng.randint(1, 200) + rng.randint(
            -1, 1
        )
    return max(1, int(10 ** rng.uniform(0, 4.3))), max(1, int(10 ** rng.uniform(0, 4.3)))


@pytest.mark.parametrize(
    "rules",
    [
        RULES,
        SliceRules(scale_resolution=112, patch_size=14, max_slice_nums=6),
        SliceRules(scale_resolution=70, patch_size=10, max_slice_nums=25),
        SliceRules(slice_mode=False),
    ],
)
def test_plans_equal_a_second_transcription(rules: SliceRules) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(3000):
        size = random_size(rng)
        limit = rng.choice([None, None, 1, 2, 3, 9, 16])
        n = rules.max_slice_nums if limit is None else limit
        try:
            plan = plan_slices(size, rules, limit)
        except MediaError:
            assert max(size) / min(size) > 60 * (rules.scale_resolution / rules.patch_size) ** 2, size
            continue
        assert plan == reference_plan(*size, rules, n), (size, limit)
        check_rules(plan, rules, n)


def check_rules(plan: SlicePlan, rules: SliceRules, n: int) -> None:
    p = rules.patch_size
    sizes = [plan.overview] + ([plan.cell] if plan.cell else [])
    for width, height in sizes:
        assert width % p == 0
        assert height % p == 0
        assert width >= p
        assert height >= p
        assert (width // p) * (height // p) <= MAX_SLICE_GROWTH * (rules.scale_resolution // p) ** 2
    assert (plan.grid is None) == (plan.cell is None)
    if plan.grid is not None:
        assert 2 <= plan.grid[0] * plan.grid[1] <= n
        assert plan.num_slices == 1 + plan.grid[0] * plan.grid[1]
    else:
        assert plan.num_slices == 1


@pytest.mark.parametrize(
    ("size", "plan"),
    [
        # Worked out by hand from the rules.
        ((448, 448), SlicePlan((448, 448))),
        ((100, 100), SlicePlan((448, 448))),
        ((449, 448), SlicePlan((448, 448), (2, 1), (322, 630))),
        ((1344, 896), SlicePlan((546, 364), (3, 2), (448, 448))),
        ((1344, 1344), SlicePlan((448, 448), (3, 3), (448, 448))),
        ((1, 1000), SlicePlan((14, 14168))),
        ((1000, 1), SlicePlan((14000, 14))),
    ],
)
def test_known_plans(size: tuple[int, int], plan: SlicePlan) -> None:
    assert plan_slices(size, RULES) == plan


def test_usual_pictures_stay_within_the_position_table() -> None:
    rng = random.Random(7)
    for _ in range(2000):
        width = rng.randint(32, 6000)
        height = max(1, int(width * 4 ** rng.uniform(-1, 1)))
        plan = plan_slices((width, height), RULES)
        for side in (*plan.overview, *(plan.cell or ())):
            assert 14 <= side <= 70 * 14


def test_override_and_slice_mode() -> None:
    big = (2000, 1500)
    assert plan_slices(big, RULES, 1).grid is None
    assert plan_slices(big, RULES, 2).num_slices == 3
    assert plan_slices(big, SliceRules(slice_mode=False), 9).grid is None
    for bad in (0, -1, True, 2.0, "3"):
        with pytest.raises(InputError, match="max_slice_nums"):
            plan_slices(big, RULES, bad)  # type: ignore[arg-type]


def test_strips() -> None:
    assert plan_slices((1, 65_000), RULES).overview[0] == 14
    assert plan_slices((110_000, 1), RULES).overview[1] == 14
    with pytest.raises(MediaError, match="too thin a strip"):
        plan_slices((1, 150_000_000), RULES)
    with pytest.raises(MediaError, match="empty"):
        plan_slices((0, 5), RULES)


def test_pillows_bytes_are_the_pixels_and_cells_tile_the_picture() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    rules = SliceRules(scale_resolution=112)
    for _ in range(40):
        width, height = (int(x) for x in rng.integers(1, 500, 2))
        rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        plan = plan_slices((width, height), rules)
        slices = cut_slices(rgb, plan)
        assert len(slices) == plan.num_slices
        pillow = Image.fromarray(rgb)
        overview = np.asarray(pillow.resize(plan.overview, Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(slices[0], overview)
        if plan.grid is not None and plan.cell is not None:
            (columns, rows), cell = plan.grid, plan.cell
            whole = pillow.resize((cell[0] * columns, cell[1] * rows), Image.Resampling.BICUBIC)
            for index, cut in enumerate(slices[1:]):
                row, column = divmod(index, columns)
                left, top = column * cell[0], row * cell[1]
                expected = whole.crop((left, top, left + cell[0], top + cell[1]))
                np.testing.assert_array_equal(cut, np.asarray(expected))
        for cut in slices:
            assert cut.dtype == np.uint8
            assert cut.flags.writeable
            assert cut.flags.c_contiguous


def test_keys_follow_pixels_and_plan() -> None:
    rng = np.random.default_rng(3)
    rgb = rng.integers(0, 256, (600, 700, 3), dtype=np.uint8)
    other = rgb.copy()
    other[0, 0, 0] ^= 1
    first = prepare_picture(Picture.open(rgb), RULES)
    assert prepare_picture(Picture.open(rgb.copy()), RULES).key == first.key
    assert prepare_picture(Picture.open(rgb), RULES, 1).key != first.key
    assert prepare_picture(Picture.open(other), RULES).key != first.key
    assert prepare_picture(Picture.open(rgb.transpose(1, 0, 2)), RULES).key != first.key


def test_items_keep_their_order() -> None:
    rng = np.random.default_rng(4)
    pictures = [Picture.open(rng.integers(0, 256, (60 + i, 500, 3), dtype=np.uint8)) for i in range(6)]
    items = [
        MediaItem((pictures[0],)),
        MediaItem(tuple(pictures[1:5]), kind="video", max_slice_nums=2, use_image_id=False),
        MediaItem((pictures[5],), max_slice_nums=1),
    ]
    rules = SliceRules(scale_resolution=112)
    plain = prepare_items(items, rules)
    limits = [None, 2, 2, 2, 2, 1]
    expected = [prepare_picture(p, rules, n).key for p, n in zip(pictures, limits, strict=True)]
    assert [p.key for p in plain] == expected


def write_rules(folder, **changes):  # type: ignore[no-untyped-def]
    fields = {
        "max_slice_nums": 9,
        "scale_resolution": 448,
        "patch_size": 14,
        "use_image_id": True,
        "image_feature_size": 64,
        "slice_mode": True,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        **changes,
    }
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


def test_rules_come_from_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    write_rules(tmp_path)
    assert read_slice_rules(tmp_path) == SliceRules()
    write_rules(
        tmp_path, max_slice_nums=4, scale_resolution=112, patch_size=8, use_image_id=False, norm_std=[1, 2, 3]
    )
    rules = read_slice_rules(str(tmp_path))
    assert rules == SliceRules(
        scale_resolution=112, patch_size=8, max_slice_nums=4, use_image_id=False, norm_std=(1.0, 2.0, 3.0)
    )
    write_rules(tmp_path, use_image_id=..., slice_mode=..., norm_mean=..., norm_std=...)
    assert read_slice_rules(tmp_path) == SliceRules(use_image_id=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": ...}, "patch_size is missing"),
        ({"scale_resolution": "448"}, "scale_resolution is '448'"),
        ({"max_slice_nums": True}, "max_slice_nums is True"),
        ({"image_feature_size": 0}, "image_feature_size is 0"),
        ({"slice_mode": 1}, "slice_mode is 1"),
        ({"norm_mean": [0.5]}, "norm_mean"),
        ({"norm_std": [0.5, 0.0, 0.5]}, "norm_std"),
        ({"scale_resolution": 7}, "scale_resolution 7"),
    ],
)
def test_bad_rules_are_named_in_one_line(tmp_path, changes, words) -> None:  # type: ignore[no-untyped-def]
    write_rules(tmp_path, **changes)
    with pytest.raises(ModelError, match=words) as caught:
        read_slice_rules(tmp_path)
    assert "\n" not in str(caught.value)
    assert "preprocessor_config.json" in str(caught.value)


def test_missing_and_broken_rules(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json.*not a complete.*download"):
        read_slice_rules(tmp_path)
    broken = {
        b"{": "cannot be read as JSON",
        b"[1]": "does not hold a JSON object",
        b"\xff\xfe\x00": "cannot",
    }
    for content, words in broken.items():
        (tmp_path / "preprocessor_config.json").write_bytes(content)
        with pytest.raises(ModelError, match=rf"preprocessor_config\.json {words}") as caught:
            read_slice_rules(tmp_path)
        assert "\n" not in str(caught.value)
        assert "download it again" in str(caught.value)
