"""From our `SamplingParams` to vLLM's, one sequence at a time.

Text is ours: vLLM gets no stop strings and detokenizes nothing, so an answer's text and its end follow the same
rules on both engines. Stop tokens are named one by one (`ignore_eos` is always set), for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huoyan.errors import InputError

if TYPE_CHECKING:
    from huoyan.api.sampling_params import SamplingParams
    from huoyan.engine.answer import StopRules

MAX_TEMPERATURE = 2.0
"""vLLM's."""
TOKENS_AT_ONCE = 16
"""That vLLM reports together where nobody reads them one by one: an object a token is most of what its reports cost.
Few enough that turning the last of them into text, which nothing hides, takes no time that matters."""


def check_supported(params: SamplingParams) -> None:
    """Raise InputError where vLLM cannot do what is asked."""
    if params.temperature > MAX_TEMPERATURE:
        raise InputError(
            f"temperature={params.temperature:g} with engine='vllm': it must be at most {MAX_TEMPERATURE:g}"
        )
    if params.use_beam_search and params.repetition_penalty != 1.0:
        raise InputError(
            f"repetition_penalty={params.repetition_penalty:g} with use_beam_search: vLLM does not give the "
            "logits that it needs; leave it out, or use engine='native'"
        )


def sample_params(
    params: SamplingParams,
    rules: StopRules,
    max_tokens: int,
    index: int,
    logprobs: int | None,
    streamed: bool = True,
) -> Any:
    """vLLM's parameters for the `index`-th answer.

    Args:
        max_tokens: tokens it may have.
        logprobs: likeliest tokens to report; 0 reports the chosen one alone, None nothing.
        streamed: whether each token is wanted as soon as it is there.
    """
    return _make(
        rules,
        # A stop string is to be seen before more is generated behind it.
        stream_interval=1 if streamed or params.stop else TOKENS_AT_ONCE,
        max_tokens=max_tokens,
        min_tokens=min(params.min_tokens, max_tokens),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        seed=None if params.seed is None else _seed(params.seed, index),
        logit_bias=None if params.logit_bias is None else dict(params.logit_bias),
        logprobs=logprobs,
        prompt_logprobs=params.prompt_logprobs if index == 0 else None,
        structured_outputs=_structured(params.structured_outputs),
    )


def beam_params(params: SamplingParams, rules: StopRules, max_tokens: int, logprobs: int, first: bool) -> Any:
    """vLLM's parameters for a run that follows a beam greedily, reporting what may follow each token.

    Args:
        logprobs: -1 for the whole vocabulary.
        first: whether it is the search's first, which also reports on the prompt.
    """
    return _make(
        rules,
        max_tokens=max_tokens,
        temperature=0.0,
        logprobs=logprobs,
        flat_logprobs=logprobs == -1,
        prompt_logprobs=params.prompt_logprobs if first else None,
    )


def _make(rules: StopRules, **fields: Any) -> Any:
    stops = set(rules.token_ids)
    if rules.eos_token_id is not None:
        stops.add(rules.eos_token_id)
    return vllm_params(stop_token_ids=sorted(stops), **fields)


def vllm_params(**fields: Any) -> Any:
    """vLLM's `SamplingParams` for one sequence, whose text is made here."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    if fields.get("stream_interval", 1) == 1 or not hasattr(VllmParams, "stream_interval"):
        # vLLM 0.26 has it for the whole engine only.
        fields.pop("stream_interval", None)
    return VllmParams(
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
        **fields,
    )


def _structured(wanted: Mapping[str, Any] | None) -> Any:
    if wanted is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    kind, content = next((k, v) for k, v in wanted.items() if v is not None)
    if kind == "json" and content is True:
        kind, content = "json_object", True
    if kind == "json" and isinstance(content, Mapping):
        content = dict(content)
    if kind == "choice":
        content = list(content)
    return StructuredOutputsParams(**{kind: content})


def _seed(seed: int, index: int) -> int:
    """The `index`-th answer's seed, as vLLM counts them; both take 64 bits."""
    return (seed + index) % 2**64
