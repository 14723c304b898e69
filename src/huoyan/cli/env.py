"""`huoyan env`: what to paste into a bug report."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Print versions, devices, memory and settings: what to paste into a bug report. It holds no secrets."""
    report = collect()
    if as_json:
        import json

        print(json.dumps(report, ensure_ascii=False, indent=2))
        return
    for section, entries in report.items():
        print(f"{section}:")
        if not entries:
            print("  none")
        for name, value in entries.items():
            print(f"  {name}: {value}")


def collect() -> dict[str, dict[str, Any]]:
    """The report, section by section."""
    return {
        "huoyan": _huoyan(),
        "system": _system(),
        "packages": _packages(),
        "devices": _devices(),
        "models": _models(),
        "environment": _environment(),
    }


def _huoyan() -> dict[str, Any]:
    import sys
    from pathlib import Path

    import huoyan

    return {
        "version": huoyan.__version__,
        "folder": str(Path(huoyan.__file__).parent),
        "python": sys.version.split()[0],
        "executable": sys.executable,
    }


def _system() -> dict[str, Any]:
    import os
    import platform

    from huoyan.cli.models import readable_size
    from huoyan.cores import usable_cores

    report: dict[str, Any] = {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name() or "unknown",
        "cores": f"{usable_cores()} usable of {os.cpu_count()}",
    }
    memory = _memory()
    if memory is not None:
        total, available = memory
        report["memory"] = f"{readable_size(available)} available of {readable_size(total)}"
    return report


def _cpu_name() -> str | None:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _memory() -> tuple[int, int] | None:
    """(total, available) in bytes."""
    import os

    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        return fields["MemTotal"], fields["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return total, total


_PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "jinja2", "huggingface_hub", "pillow", "av",
    "typer", "rich", "pydantic", "transformers", "modelscope", "llguidance", "vllm", "ray", "fastapi",
)  # fmt: skip


def _packages() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    def one(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {name: one(name) for name in _PACKAGES}


def _devices() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:
        return {"torch": f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"}
    from huoyan.cli.models import readable_size

    report: dict[str, Any] = {
        "cpu threads": torch.get_num_threads(),
        "torch built for CUDA": torch.version.cuda,
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            report[f"cuda:{index}"] = (
                f"{properties.name}, compute {properties.major}.{properties.minor}, "
                f"{readable_size(free)} free of {readable_size(total)}"
            )
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        report["mps"] = "available"
    return report


def _models() -> dict[str, Any]:
    from huoyan.cli.models import readable_size
    from huoyan.models.local_models import list_local_models

    try:
        found = list_local_models()
    except OSError as error:
        # A report about a broken machine must not break on it.
        return {"error": f"{error.filename}: {error.strerror}"}
    return {
        model.name: ", ".join(
            (model.source, readable_size(model.size), "complete" if model.complete else "incomplete")
        )
        for model in found
    }


_PREFIXES = ("HUOYAN_", "HF_", "HUGGINGFACE_", "MODELSCOPE_", "CUDA_", "PYTORCH_", "TORCH_", "OMP_", "MKL_",
             "TRITON_", "TRANSFORMERS_", "NVIDIA_")  # fmt: skip
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL", "AUTH")


def _environment() -> dict[str, Any]:
    import os

    names = sorted(name for name in os.environ if name.startswith(_PREFIXES))
    return {name: _without_secret(name, os.environ[name]) for name in names}


def _without_secret(name: str, value: str) -> str:
    import re

    if any(word in name.upper() for word in _SECRET):
        return "set (not shown)"
    return re.sub(r"//[^/@\s]*@", "//***@", value)
