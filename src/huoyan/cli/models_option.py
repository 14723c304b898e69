"""From `--model` and its companions to a loaded `LLM`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from huoyan.cli.console import dim
from huoyan.cli.options import DEFAULT_MODEL

if TYPE_CHECKING:
    from huoyan.api.llm import LLM


def model_name(given: str | None) -> str:
    """`--model`, else `$HUOYAN_MODEL`, else the published model."""
    return given or os.environ.get("HUOYAN_MODEL") or DEFAULT_MODEL


def open_llm(model: str | None, *, quiet: bool = False, **options: Any) -> LLM:
    """Load the model a command was asked to use; `quiet` leaves out the note about demonstration models."""
    from huoyan.models.local_models import EMBEDDED

    name = model_name(model)
    if name in EMBEDDED and not quiet and not os.path.isdir(name):
        dim(f"{name} is a demonstration model, trained on drawings: it does not know photographs")
    from huoyan.api.llm import LLM

    return LLM(name, **options)
