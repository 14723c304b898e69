"""What both engines are asked: checkpoints of odd shapes, and prompts with none to three odd pictures."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from huoyan.bench.random_checkpoint import CheckpointShape, write_random_checkpoint

MAX_TOKENS = 12
BEAM_WIDTH = 3


@dataclass(frozen=True, eq=False)
class Case:
    """One checkpoint. `shape` None is the embedded model."""

    name: str
    shape: CheckpointShape | None
    quantization: str | None = None
    dtype: str = "float32"
    """Of the files."""
    options: dict[str, Any] = field(default_factory=dict)
    """`mm_processor_kwargs` of the whole engine."""
    num_requests: int | None = None
    compute: str = "float32"
    """Of vLLM, whose int4 runs in 16 bits only; the engine always computes in float32."""
    tolerance: float = 1e-3
    """Of a log-probability."""

    def write(self, folder: Path, seed: int) -> Path:
        if self.shape is None:
            import huoyan.tiny

            return Path(huoyan.tiny.__file__).parent / "checkpoint"
        return write_random_checkpoint(
            folder,
            self.shape,
            seed=seed,
            dtype=self.dtype,
            quantization=self.quantization,
            shard_bytes=4_000_000,
        )


GROUPED = CheckpointShape(
    hidden_size=384,
    intermediate_size=640,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=1531,
    max_position_embeddings=8192,
    vision_hidden_size=144,
    vision_intermediate_size=200,
    vision_num_hidden_layers=2,
    vision_num_attention_heads=2,
)
ONE_KV_HEAD = CheckpointShape(
    hidden_size=256,
    intermediate_size=328,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=1,
    vocab_size=333,
    max_position_embeddings=8192,
    # As wide as the decoder: then there is no resampler.kv_proj.
    vision_hidden_size=256,
    vision_intermediate_size=136,
    vision_num_hidden_layers=3,
    vision_num_attention_heads=8,
    vision_image_size=280,
    query_num=20,
    scale_resolution=196,
)
INT4 = CheckpointShape(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=700,
    max_position_embeddings=8192,
    vision_hidden_size=64,
    vision_intermediate_size=128,
    vision_num_hidden_layers=1,
    vision_num_attention_heads=1,
    scale_resolution=224,
)
CASES = (
    Case("tiny", None),
    Case("grouped heads", GROUPED),
    Case("one kv head", ONE_KV_HEAD, options={"max_slice_nums": 4}),
    Case(
        "awq int4",
        INT4,
        quantization="awq",
        dtype="float16",
        num_requests=6,
        compute="float16",
        tolerance=0.03,
    ),
)

SIZES = {
    "square": (448, 448),
    "above": (449, 448),
    "line": (333, 1),
    "column": (1, 120),
    "dot": (1, 1),
    "small": (13, 7),
    "panorama": (1200, 90),
    "tower": (70, 800),
    "photo": (640, 427),
    "large": (1344, 896),
}


def write_pictures(folder: Path) -> dict[str, str]:
    """PNG files of odd sizes and modes, by name."""
    files = {}
    for name, size in SIZES.items():
        files[name] = _save(_draw(size, name), folder / f"{name}.png")
    base = _draw((300, 200), "modes")
    alpha = base.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(base.size))
    files["alpha"] = _save(alpha, folder / "alpha.png")
    files["grey"] = _save(base.convert("L"), folder / "grey.png")
    files["palette"] = _save(base.quantize(16), folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "turned.jpg", exif=exif)
    files["turned"] = str(folder / "turned.jpg")
    return files


def _save(image: Image.Image, path: Path) -> str:
    image.save(path)
    return str(path)


def _draw(size: tuple[int, int], name: str) -> Image.Image:
    """Shapes on a gradient: no two places alike, so that a patch out of place is noticed."""
    rng = random.Random(name)
    ramp = Image.linear_gradient("L")
    turned = ramp.transpose(Image.Transpose.ROTATE_90)
    channels = (ramp.resize(size), turned.resize(size), Image.radial_gradient("L").resize(size))
    image = Image.merge("RGB", channels)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        box = (x, y, x + rng.randint(1, 1 + size[0] // 3), y + rng.randint(1, 1 + size[1] // 3))
        colour = tuple(rng.randrange(256) for _ in range(3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=colour)
    return image


CHATS: tuple[tuple[str, tuple[str, ...], str | None], ...] = (
    ("What is in this picture?", ("photo",), None),
    ("请描述这张图片", ("square",), None),
    ("天空是什么颜色？", ("turned",), "你是一个有用的助手。"),
    ("Which colour is the car?", ("alpha",), None),
    ("两张图片有什么不同？", ("above", "dot"), None),
    ("Compare them, please.\nAnswer in one line.", ("palette", "small", "grey"), "Be brief."),
    ("你好！", (), None),
)
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PICTURE = "(<image>./</image>)"
RAWS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    (TURN.format(f"{PICTURE}\n请描述这张图片"), ("large",), BEAM_WIDTH),
    (TURN.format(f"{PICTURE}\nHow many boats are there?"), ("panorama",), 0),
    (TURN.format(f"first {PICTURE} second{PICTURE}, which one has more?"), ("tower", "photo"), BEAM_WIDTH),
    (TURN.format(f"{PICTURE}{PICTURE}{PICTURE}\nWhich is the largest?"), ("line", "column", "dot"), 0),
    ("The sky is blue, 天空是蓝色的,", (), BEAM_WIDTH),
)


def requests(case: Case, pictures: dict[str, str]) -> list[dict[str, Any]]:
    """The case's requests as both engines read them."""
    chats: list[dict[str, Any]] = [
        {"question": question, "pictures": [pictures[name] for name in names], "system": system}
        for question, names, system in CHATS
    ]
    raws: list[dict[str, Any]] = [
        {
            # A trained model was never shown text outside a turn: it goes on in nonsense, where its attention is so
            # sharp that two ways of float32 are 2e-3 apart in tokens of a fifth.
            "prompt": prompt if case.shape or prompt.startswith("<|im_start|>") else TURN.format(prompt),
            "pictures": [pictures[name] for name in names],
            # In 16 bits a search loses a beam where rounding decides, and nothing behind that compares.
            "beams": beams if case.compute == "float32" else 0,
        }
        for prompt, names, beams in RAWS
    ]
    mixed = [request for pair in zip(raws, chats, strict=False) for request in pair] + chats[len(raws) :]
    return [{"id": str(i), **request} for i, request in enumerate(mixed[: case.num_requests])]
