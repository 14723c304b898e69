"""Folders exactly as hubs have them: every config points to Python code beside it, which must never run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

AUTO_MAPS: dict[str, dict[str, Any]] = {
    "config.json": {
        "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
        "AutoModel": "modeling_minicpmv.MiniCPMV",
        "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
    },
    "preprocessor_config.json": {
        "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
        "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
    },
    "tokenizer_config.json": {
        "AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None],
    },
}
OTHER_FIELDS = {
    "config.json": {},
    "preprocessor_config.json": {"processor_class": "MiniCPMVProcessor"},
    "tokenizer_config.json": {"tokenizer_class": "MiniCPMVTokenizer"},
}
CODE_RAN = "code of the checkpoint was run"


def publish(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of `source` (weights linked) in the published layout; `config` changes fields of `config.json`."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path.resolve())
        elif path.is_file():
            shutil.copy(path, folder / path.name)
    for name, auto_map in AUTO_MAPS.items():
        changes = OTHER_FIELDS[name] | {"auto_map": auto_map} | (config if name == "config.json" else {})
        change(folder / name, **changes)
        for reference in auto_map.values():
            first = reference[0] if isinstance(reference, list) else reference
            module = first.partition(".")[0]
            (folder / f"{module}.py").write_text(f"raise RuntimeError({CODE_RAN!r})\n", encoding="utf-8")
    return folder


def change(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    contents = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(contents | fields, indent=1), encoding="utf-8")
