"""Where the plugin takes hold of vLLM: reading a config, reading a tokenizer, the registry of models.

vLLM has a registry for models but none for configs and tokenizers that looks further than `model_type`, which
all versions of MiniCPM-V share. So its two readers are wrapped; whatever is not version 2.6 passes untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from huoyan.vllm_plugin import ARCHITECTURE

_MARK = "_huoyan_original"
_recognised: set[str] = set()
"""Names and folders whose config was read and is version 2.6: vLLM reads a config before its tokenizer."""


def install() -> None:
    """Wrap the readers and register the model, where that is not done yet.

    Raises:
        ImportError, AttributeError: this vLLM lacks one of the three.
    """
    from vllm import ModelRegistry
    from vllm.tokenizers.hf import CachedHfTokenizer, get_cached_tokenizer  # noqa: F401
    from vllm.transformers_utils.config import HFConfigParser

    parse, from_pretrained = HFConfigParser.parse, CachedHfTokenizer.from_pretrained
    if not hasattr(parse, _MARK):
        HFConfigParser.parse = _parsing(parse)
    if not hasattr(from_pretrained, _MARK):
        CachedHfTokenizer.from_pretrained = classmethod(_loading(from_pretrained.__func__))
    # By name: the module is imported when the model is.
    ModelRegistry.register_model(ARCHITECTURE, f"huoyan.vllm_plugin.model:{ARCHITECTURE}")


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether the fields of a `config.json` are those of MiniCPM-V 2.6."""
    return config.get("model_type") == "minicpmv" and str(config.get("version")) == "2.6"


def _parsing(original: Any) -> Any:
    @functools.wraps(original)
    def parse(
        self: Any,
        model: Any,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], Any]:
        fields = _config_fields(model, revision, kwargs)
        if fields is None:
            return original(self, model, trust_remote_code, revision, code_revision, **kwargs)  # type: ignore[no-any-return]
        from huoyan.vllm_plugin.config import MiniCPMVConfig
        from huoyan.vllm_plugin.int4 import complete_quantization_config

        _recognised.add(str(model))
        complete_quantization_config(fields, str(model), revision)
        fields["architectures"] = [ARCHITECTURE]
        # vLLM goes on with the fields as well, and `from_dict` writes into what it is given.
        return fields, MiniCPMVConfig.from_dict(dict(fields), name_or_path=str(model))

    setattr(parse, _MARK, original)
    return parse


def _config_fields(model: Any, revision: str | None, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The contents of `config.json`; None for any other model, and for what vLLM had better report itself."""
    import huggingface_hub
    from transformers import PretrainedConfig

    known = {k: v for k, v in kwargs.items() if k not in ("hf_overrides", "trust_remote_code")}
    known["local_files_only"] = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        fields, _ = PretrainedConfig.get_config_dict(model, revision=revision, **known)
    except (OSError, ValueError):
        return None
    overrides = kwargs.get("hf_overrides")
    # A dict of overrides is applied by vLLM afterwards; here it only tells which model is meant.
    meant = {**fields, **overrides} if isinstance(overrides, dict) else fields
    return fields if is_ours(meant) else None


def _loading(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(
        cls: type,
        path_or_repo_id: Any,
        *args: Any,
        trust_remote_code: bool = False,
        revision: str | None = None,
        download_dir: str | None = None,
        **kwargs: Any,
    ) -> Any:
        if str(path_or_repo_id) not in _recognised:
            return original(
                cls,
                path_or_repo_id,
                *args,
                trust_remote_code=trust_remote_code,
                revision=revision,
                download_dir=download_dir,
                **kwargs,
            )
        from vllm.tokenizers.hf import get_cached_tokenizer

        from huoyan.vllm_plugin.tokenizer import load_tokenizer

        return get_cached_tokenizer(
            load_tokenizer(path_or_repo_id, *args, revision=revision, cache_dir=download_dir, **kwargs)
        )

    setattr(from_pretrained, _MARK, original)
    return from_pretrained
