"""llm-compressor's AWQ of `tiny`'s decoder on our calibration set, beside ours.

    PYTHONPATH=src python benchmarks/int4_llmcompressor.py prepare FOLDER [--model tiny] [--group-size 64]
    python benchmarks/int4_llmcompressor.py compress FOLDER     (in an environment with llmcompressor)
    PYTHONPATH=src python benchmarks/int4_llmcompressor.py collect FOLDER

`prepare` writes the decoder as a transformers Qwen2 and the calibration's embeddings, `compress` runs
llm-compressor on them, `collect` makes of the result a whole checkpoint, FOLDER/checkpoint, to be measured with
`benchmarks/int4_quality.py --also llm-compressor=FOLDER/checkpoint`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_EVERY = 4


def prepare(folder: Path, model: str, group_size: int, items: int) -> None:
    """FOLDER/qwen2 (float32) and FOLDER/embeddings.safetensors, one tensor [tokens, hidden] an item."""
    sys.path[:0] = [str(_ROOT / "training"), str(_ROOT / "src")]
    import torch
    from safetensors.torch import save_file

    from huoyan.models.checkpoint import open_checkpoint
    from huoyan.models.hub import resolve_model
    from huoyan.models.weights import load_model, published_state
    from huoyan.prompt.processor import PromptProcessor
    from huoyan.quantize.calibration import embed_items, encode_items, read_calibration
    from make_calibration import write

    source = resolve_model(model)
    loaded = load_model(open_checkpoint(source), dtype="float32")
    encoded = encode_items(
        read_calibration(write(folder / "calibration", items)), PromptProcessor.from_folder(source), 1024
    )
    with torch.inference_mode():
        embedded = embed_items(encoded, loaded)
    calibrated = [e for i, e in enumerate(embedded) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    save_file(
        {f"{i:04d}": e.embeddings.clone() for i, e in enumerate(calibrated) if e.embeddings is not None},
        folder / "embeddings.safetensors",
    )
    qwen = folder / "qwen2"
    qwen.mkdir(exist_ok=True)
    state = {
        name.removeprefix("llm."): value.clone()
        for name, value in published_state(loaded).items()
        if name.startswith("llm.")
    }
    save_file(state, qwen / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kept = {
        name: value
        for name, value in raw.items()
        if name not in ("vision_config", "slice_config", "version", "torch_dtype")
    }
    kept |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "dtype": "float32"}
    (qwen / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    (folder / "job.json").write_text(json.dumps({"source": str(source), "group_size": group_size}))


def compress(folder: Path) -> None:
    """FOLDER/compressed: what llm-compressor writes."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader
    from transformers import Qwen2ForCausalLM

    if not torch.cuda.is_available():
        # It pins its cache without asking whether there is a device to pin for.
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    group_size = json.loads((folder / "job.json").read_text())["group_size"]
    model = Qwen2ForCausalLM.from_pretrained(folder / "qwen2", dtype=torch.float32)
    rows: list[Any] = [
        {"inputs_embeds": x[None], "attention_mask": torch.ones(1, len(x), dtype=torch.long)}
        for _, x in sorted(load_file(folder / "embeddings.safetensors").items())
    ]
    loader = DataLoader(rows, batch_size=1, collate_fn=lambda batch: batch[0])
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = [
        AWQModifier(duo_scaling="both"),
        QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    ]
    oneshot(
        model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(rows), pipeline="sequential"
    )
    model.save_pretrained(folder / "compressed", save_compressed=True)


def collect(folder: Path) -> None:
    """FOLDER/checkpoint: the original with the decoder's tensors replaced."""
    sys.path[:0] = [str(_ROOT / "src")]
    from safetensors.torch import load_file, save_file

    source = Path(json.loads((folder / "job.json").read_text())["source"])
    out = folder / "checkpoint"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    state = {}
    for file in sorted(source.glob("*.safetensors")):
        state |= {n: v for n, v in load_file(file).items() if not n.startswith("llm.")}
    for file in sorted((folder / "compressed").glob("*.safetensors")):
        state |= {f"llm.{n}": v for n, v in load_file(file).items()}
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith("model"):
            shutil.copyfile(path, out / path.name)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    print(out)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["prepare", "compress", "collect"])
    p.add_argument("folder", type=Path)
    p.add_argument("--model", default="tiny")
    p.add_argument("--group-size", type=int, default=64)
    p.add_argument("--items", type=int, default=64)
    a = p.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    if a.what == "prepare":
        prepare(a.folder, a.model, a.group_size, a.items)
    elif a.what == "compress":
        compress(a.folder)
    else:
        collect(a.folder)


if __name__ == "__main__":
    main()
