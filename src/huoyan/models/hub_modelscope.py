"""Download a checkpoint from ModelScope through its own SDK (extra `modelscope`)."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

from huoyan.errors import ModelError
from huoyan.models.hub_huggingface import DATA_FILES


def download(name: str, revision: str | None, cache: Path | None, progress: bool) -> Path:
    """Bring the data files of `name` here and return their folder.

    Raises:
        ModelError: the SDK is not installed, or the model is not there, or cannot be reached.
    """
    from huoyan.models.hub import TINY_HINT

    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"--hub modelscope needs ModelScope's own package ({error}): pip install 'huoyan[modelscope]'"
        ) from None
    silent = not (progress and sys.stderr.isatty())
    try:
        with contextlib.ExitStack() as stack:
            if silent:
                # The SDK has no switch for its bars and notices.
                for logger in map(logging.getLogger, ("modelscope", "modelscope_hub")):
                    stack.callback(logger.setLevel, logger.level)
                    logger.setLevel(logging.CRITICAL)
                sink = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stderr(sink))
                stack.enter_context(contextlib.redirect_stdout(sink))
            folder = snapshot_download(
                name,
                revision=revision,
                cache_dir=None if cache is None else str(cache),
                allow_file_pattern=DATA_FILES,
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"ModelScope could not give {name} ({type(error).__name__}: {reason}): "
            f"check the name and the network; {TINY_HINT}"
        ) from None
    return Path(folder)
