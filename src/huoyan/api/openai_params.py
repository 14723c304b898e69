"""From the body of an OpenAI chat request to `SamplingParams` and the options of `chat`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huoyan.api.sampling_params import SamplingParams
from huoyan.errors import InputError, UnsupportedError

_CHAT_OPTIONS = (
    "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs",
    "mm_processor_kwargs",
)  # fmt: skip
_IGNORED = (
    "model", "messages", "user", "metadata", "store", "stream", "stream_options", "service_tier",
    "request_id", "priority", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
)  # fmt: skip
_REFUSED = (
    "tools",
    "functions",
    "audio",
    "modalities",
    "prediction",
    "reasoning_effort",
    "web_search_options",
)


def sampling_from_body(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a chat request; `defaults` are fields of `SamplingParams` for what it leaves out.

    Raises:
        InputError: an unknown field, or a value out of its range.
        UnsupportedError: a field this model has no use for, such as `tools`.
    """
    fields: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _IGNORED or name in _CHAT_OPTIONS:
            continue
        if name in _SPECIAL:
            fields.update(_SPECIAL[name](value, body))
        elif name not in _REFUSED:
            fields[name] = value
        elif value not in ([], {}, ["text"], "none"):
            raise UnsupportedError(f"{name} is not supported by this model: leave it out")
    return with_defaults(fields, defaults)


def with_defaults(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """`SamplingParams.from_dict` for requests in which a beam search need not spell its temperature out."""
    if fields.get("use_beam_search") and fields.get("temperature") is None:
        fields = {**fields, "temperature": 0.0}
    return SamplingParams.from_dict(fields, defaults)


def chat_options_from_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `LLM.chat` that a body can carry."""
    return {name: body[name] for name in _CHAT_OPTIONS if body.get(name) is not None}


def _logprobs(value: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise InputError(f"logprobs must be true or false (got {value!r}); top_logprobs says how many")
    return {"logprobs": body.get("top_logprobs") or 0} if value else {}


def _top_logprobs(value: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    if not body.get("logprobs") and value:
        raise InputError("top_logprobs needs logprobs: true")
    return {}


def _logit_bias(value: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError("logit_bias must be an object of token ids and numbers")
    try:
        return {"logit_bias": {int(token): float(bias) for token, bias in value.items()}}
    except (TypeError, ValueError):
        raise InputError("logit_bias must be an object of token ids and numbers") from None


def _response_format(value: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"structured_outputs": {"json": {"type": "object"}}}
    schema = value.get("json_schema") if isinstance(value, Mapping) else None
    if kind == "json_schema" and isinstance(schema, Mapping) and isinstance(schema.get("schema"), Mapping):
        return {"structured_outputs": {"json": schema["schema"]}}
    raise InputError("response_format must be text, json_object, or json_schema with json_schema.schema")


def _tool_choice(value: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    if value not in ("none", "auto"):
        raise UnsupportedError("tool_choice is not supported by this model: leave it out")
    return {}


_SPECIAL = {
    "logprobs": _logprobs,
    "top_logprobs": _top_logprobs,
    "logit_bias": _logit_bias,
    "response_format": _response_format,
    "tool_choice": _tool_choice,
}
