"""What `SamplingParams` refuses: each refusal names the parameter, its value and what is allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import TYPE_CHECKING, Any

from huoyan.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from huoyan.api.sampling_params import SamplingParams

MAX_BIAS = 100.0
MAX_LENGTH_PENALTY = 32.0
"""A length to a greater power does not fit in a float."""
STRUCTURED_KINDS = ("json", "json_object", "regex", "choice", "grammar")

_ELSEWHERE = {
    "logits_processors": "no code of the caller runs between steps; use logit_bias or structured_outputs",
    "truncate_prompt_tokens": "a prompt with pictures cannot be cut; shorten it, or raise max_model_len",
    "bad_words": "use logit_bias with the words' token ids",
    "allowed_token_ids": "use structured_outputs with a choice or a regex",
    "output_kind": "outputs are cumulative",
    "guided_decoding": "write structured_outputs, a mapping such as {'json': schema}",
}
_OTHER_NAMES = {"max_completion_tokens": "max_tokens", "max_new_tokens": "max_tokens"}
_GUIDED = {f"guided_{kind}": kind for kind in STRUCTURED_KINDS}


def known(name: str, names: Sequence[str]) -> None:
    """Refuse a name that is no field."""
    if name in names:
        return
    if name in _ELSEWHERE:
        raise UnsupportedError(f"the sampling parameter {name} is not supported: {_ELSEWHERE[name]}")
    other = _OTHER_NAMES.get(name) or ("structured_outputs" if name in _GUIDED else None)
    near = [other] if other else get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise InputError(f"no sampling parameter is called {name!r}: {hint}")


def aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under this package's names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in _GUIDED:
            if value is None:
                continue
            ours, value = "structured_outputs", {_GUIDED[name]: value}
        else:
            ours = _OTHER_NAMES.get(str(name), str(name))
        if value is None and ours in _ELSEWHERE:
            continue
        if found.get(ours) is not None and value is not None:
            raise InputError(f"{name} says again what {ours} says: give one of them")
        if found.get(ours) is None:
            found[ours] = value
    return found


def usable_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's defaults that go with what a request gives: filters are no part of a beam search."""
    kept = {name: value for name, value in defaults.items() if value is not None}
    if kept.get("top_k") == 0:
        # transformers writes 0 where vLLM writes -1.
        kept["top_k"] = -1
    if given.get("use_beam_search"):
        kept = {n: v for n, v in kept.items() if n not in ("temperature", "top_p", "top_k", "min_p")}
    return kept


def integer(name: str, value: Any, optional: bool = False) -> int | None:
    if value is None and optional:
        return None
    if isinstance(value, bool):
        raise InputError(f"{name}={value}: it must be a whole number")
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name}={value!r}: it must be a whole number") from None


def real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name}={value!r}: it must be a number")
    number = float(value)
    if not math.isfinite(number):
        raise InputError(f"{name}={number}: it must be a finite number")
    return number


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r}: it must be True or False")


def strings(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(s, str) for s in value):
        raise InputError(f"{name}={value!r}: it must be a string or a list of strings")
    return list(value)


def token_ids(name: str, value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)):
        raise InputError(f"{name}={value!r}: it must be a list of token ids")
    try:
        items = list(value)
    except TypeError:
        raise InputError(f"{name}={value!r}: it must be a list of token ids") from None
    for item in items:
        if item is None:
            raise InputError(f"{name} contains None: the tokenizer does not know one of the tokens")
    ids = [_index(name, item) for item in items]
    return list(dict.fromkeys(ids))


def logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InputError(f"logit_bias={value!r}: it must map token ids to numbers")
    found: dict[int, float] = {}
    for key, bias in value.items():
        token_id = _index("logit_bias", int(key) if isinstance(key, str) and key.isdecimal() else key)
        if isinstance(bias, bool) or not isinstance(bias, Real) or math.isnan(float(bias)):
            raise InputError(f"logit_bias of token {token_id} is {bias!r}: it must be a number")
        found[token_id] = min(MAX_BIAS, max(-MAX_BIAS, float(bias)))
    return found


def _index(name: str, item: Any) -> int:
    if isinstance(item, bool):
        raise InputError(f"{name} contains {item!r}: it must be a token id")
    try:
        token_id = operator.index(item)
    except TypeError:
        raise InputError(f"{name} contains {item!r}: it must be a token id") from None
    if token_id < 0:
        raise InputError(f"{name} contains {token_id}: token ids are 0 or more")
    return token_id


def numbers(p: SamplingParams) -> None:
    """The range of each number, and the two pairs that limit each other."""
    if p.n < 1:
        raise InputError(f"n={p.n}: it must be at least 1")
    if p.num_sequences < p.n:
        raise InputError(f"best_of={p.best_of}: it must be at least n, which is {p.n}")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(p, name)
        if not -2.0 <= value <= 2.0:
            raise InputError(f"{name}={value:g}: it must lie from -2 to 2")
    if not 0.0 < p.repetition_penalty <= 2.0:
        raise InputError(f"repetition_penalty={p.repetition_penalty:g}: it must be above 0 and at most 2")
    if p.temperature < 0.0:
        raise InputError(f"temperature={p.temperature:g}: it must be 0 (greedy) or more")
    if not 0.0 < p.top_p <= 1.0:
        raise InputError(f"top_p={p.top_p:g}: it must be above 0 and at most 1")
    if p.top_k < -1 or p.top_k == 0:
        raise InputError(f"top_k={p.top_k}: it must be -1 (all tokens) or at least 1")
    if not 0.0 <= p.min_p <= 1.0:
        raise InputError(f"min_p={p.min_p:g}: it must lie from 0 to 1")
    if p.seed is not None and not -(2**63) <= p.seed < 2**64:
        raise InputError(f"seed={p.seed}: it must fit in 64 bits")
    if p.max_tokens is not None and p.max_tokens < 1:
        raise InputError(f"max_tokens={p.max_tokens}: it must be at least 1")
    if p.min_tokens < 0:
        raise InputError(f"min_tokens={p.min_tokens}: it must be 0 or more")
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise InputError(f"min_tokens={p.min_tokens}: it must be at most max_tokens, which is {p.max_tokens}")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(p, name)
        if count is not None and count < 0:
            raise InputError(f"{name}={count}: it must be 0 or more, or None")


def stops(p: SamplingParams) -> None:
    if any(not s for s in p.stop_strings):
        raise InputError("stop contains an empty string: it would end every answer at once")
    if p.stop_strings and not p.detokenize:
        raise InputError(f"stop={p.stop!r} needs the text of the answer: set detokenize=True")


def beam_search(p: SamplingParams, eps: float) -> None:
    if p.best_of == 1:
        raise InputError("best_of=1 with use_beam_search: set best_of, the beam's width, to 2 or more")
    if p.temperature > eps:
        raise InputError(f"temperature={p.temperature:g} with use_beam_search: it must be 0")
    if p.top_p < 1.0 - eps:
        raise InputError(f"top_p={p.top_p:g} with use_beam_search: it must be 1")
    if p.top_k != -1:
        raise InputError(f"top_k={p.top_k} with use_beam_search: it must be -1")
    if abs(p.length_penalty) > MAX_LENGTH_PENALTY:
        limit = f"{MAX_LENGTH_PENALTY:g}"
        raise InputError(f"length_penalty={p.length_penalty:g}: it must lie from -{limit} to {limit}")
    if not (isinstance(p.early_stopping, bool) or p.early_stopping == "never"):
        raise InputError(f"early_stopping={p.early_stopping!r}: it must be True, False or 'never'")


def no_beam_search(p: SamplingParams, eps: float) -> None:
    if p.early_stopping is not False:
        raise InputError(f"early_stopping={p.early_stopping!r} has no effect without use_beam_search=True")
    if abs(p.length_penalty - 1.0) > eps:
        raise InputError(f"length_penalty={p.length_penalty:g} has no effect without use_beam_search=True")


def greedy(p: SamplingParams) -> None:
    if p.num_sequences > 1:
        name, value = ("n", p.n) if p.n == p.best_of else ("best_of", p.best_of)
        raise InputError(
            f"{name}={value} with temperature=0: every answer would be the same; "
            "raise the temperature, or set use_beam_search=True"
        )


def structured(value: Any) -> None:
    """The shape of `structured_outputs`; what stands in it is compiled when the engine takes the request."""
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise InputError(f"structured_outputs={value!r}: it must be a mapping such as {{'json': schema}}")
    kinds = [kind for kind, content in value.items() if content is not None]
    if len(kinds) != 1 or kinds[0] not in STRUCTURED_KINDS:
        found = ", ".join(map(repr, kinds)) or "nothing"
        raise InputError(f"structured_outputs has {found}: it must have one of {', '.join(STRUCTURED_KINDS)}")
    kind = kinds[0]
    content = value[kind]
    if kind == "json" and not isinstance(content, (str, Mapping, bool)):
        raise InputError("structured_outputs 'json' must be a JSON schema (a mapping, or its text) or True")
    if kind == "json" and content is False:
        raise InputError("structured_outputs 'json' is False: no answer could match")
    if kind == "json_object" and content is not True:
        raise InputError(f"structured_outputs 'json_object' is {content!r}: it must be True")
    if kind in ("regex", "grammar") and not isinstance(content, str):
        raise InputError(f"structured_outputs {kind!r} must be a string, not {type(content).__name__}")
    if kind == "choice" and (
        isinstance(content, str)
        or not isinstance(content, Sequence)
        or not content
        or not all(isinstance(c, str) and c for c in content)
    ):
        raise InputError("structured_outputs 'choice' must be a list of one or more non-empty strings")
