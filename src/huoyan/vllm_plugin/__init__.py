"""A plugin of vLLM: MiniCPM-V 2.6 folders as they are published run there without `trust_remote_code`.

vLLM calls `register` in every process of its own (entry point `vllm.general_plugins`). Until a MiniCPM-V 2.6
folder is met, nothing more is imported and nothing of vLLM behaves differently. docs/vllm.md tells what it does.
"""

from __future__ import annotations

import logging

ARCHITECTURE = "HuoyanMiniCPMV"
"""What vLLM's log calls the model when it runs with the plugin."""

logger = logging.getLogger("huoyan")


def register() -> None:
    """Teach this process's vLLM the model. Safe to call any number of times.

    A vLLM whose insides are not the expected ones is left as it is, with one line in the log: the other models
    of a deployment must not fail because of this one.
    """
    try:
        from huoyan.vllm_plugin import hooks

        hooks.install()
    except (ImportError, AttributeError) as error:
        words = " ".join(str(error).split())
        logger.warning(
            "huoyan's plugin does not fit this vLLM (%s): MiniCPM-V runs as if it was not installed", words
        )
