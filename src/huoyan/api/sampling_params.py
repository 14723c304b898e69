"""What to generate and how: the parameters of one request, with vLLM's names and meanings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal

from huoyan.api import sampling_checks as checks
from huoyan.errors import InputError

SAMPLING_EPS = 1e-5
"""Temperatures below are greedy."""


class SamplingType(IntEnum):
    """How a token is chosen."""

    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2
    BEAM = 3


@dataclass
class SamplingParams:
    """Parameters of one request, with the names, defaults and refusals of vLLM 0.5.4.

    Raises InputError (a ValueError) in one line where a value or a combination makes no sense.
    """

    n: int = 1
    """Answers to return."""
    best_of: int | None = None
    """Answers to generate, of which the best `n` are returned: sampled ones by cumulative log-probability;
    with `use_beam_search` it is the width of the beam. None: `n`."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer has already; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the answer has it; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides the positive (multiplies the negative) logits of tokens that prompt or answer has; above 0, to 2."""
    temperature: float = 1.0
    """Divides the logits; 0 chooses the likeliest token."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens that hold this part of the probability; above 0, to 1."""
    top_k: int = -1
    """Sample among that many likeliest tokens; -1 for all."""
    min_p: float = 0.0
    """Sample among tokens of at least this part of the likeliest one's probability; 0 to 1."""
    seed: int | None = None
    """Makes the answer repeatable, alone or beside other requests. -1 counts as None."""
    use_beam_search: bool = False
    length_penalty: float = 1.0
    """Beams are ranked by cumulative log-probability / length ** length_penalty."""
    early_stopping: bool | Literal["never"] = False
    """When a beam search ends. True: with `best_of` finished beams. False: when the best running beam, at its
    present length, scores no better than the worst of them. "never": when it could not become better at any."""
    stop: str | Sequence[str] | None = None
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end the answer, besides the checkpoint's own."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on after the checkpoint's stop tokens."""
    max_tokens: int | None = 16
    """Tokens of an answer at most. None: as many as the context holds."""
    min_tokens: int = 0
    """Tokens of an answer before a stop token may be chosen."""
    logprobs: int | None = None
    """Return the log-probabilities of the chosen token and of that many likeliest ones. True counts as 1."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt."""
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids; held within -100 and 100."""
    structured_outputs: Mapping[str, Any] | None = field(default=None)
    """`{"json": schema}`, `{"json_object": True}`, `{"regex": pattern}`, `{"choice": [...]}` or
    `{"grammar": lark}`: the answer must match (extra `structured`)."""

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        # Dataclasses answer an unknown keyword with a TypeError that names no way out.
        for name in kwargs:
            checks.known(name, _NAMES)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._normalise()
        checks.numbers(self)
        checks.stops(self)
        checks.structured(self.structured_outputs)
        if self.use_beam_search:
            checks.beam_search(self, SAMPLING_EPS)
        else:
            checks.no_beam_search(self, SAMPLING_EPS)
            if self.temperature < SAMPLING_EPS:
                # As in vLLM: without a temperature the filters are not wrong, they are without effect.
                self.top_p, self.top_k, self.min_p = 1.0, -1, 0.0
                checks.greedy(self)

    def _normalise(self) -> None:
        for name in ("n", "top_k", "min_tokens"):
            setattr(self, name, checks.integer(name, getattr(self, name)))
        for name in ("best_of", "seed", "max_tokens"):
            setattr(self, name, checks.integer(name, getattr(self, name), optional=True))
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            value = {True: 1, False: None}[value] if isinstance(value, bool) else value
            setattr(self, name, checks.integer(name, value, optional=True))
        for name in (
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "temperature",
            "top_p",
            "min_p",
            "length_penalty",
        ):
            setattr(self, name, checks.real(name, getattr(self, name)))
        for name in (
            "use_beam_search",
            "include_stop_str_in_output",
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ):
            checks.boolean(name, getattr(self, name))
        self.best_of = self.n if self.best_of is None else self.best_of
        self.seed = None if self.seed == -1 else self.seed
        self.stop = checks.strings("stop", self.stop)
        self.stop_token_ids = checks.token_ids("stop_token_ids", self.stop_token_ids)
        self.logit_bias = checks.logit_bias(self.logit_bias)

    # -- what follows from the values ------------------------------------------------------------------------

    @property
    def sampling_type(self) -> SamplingType:
        if self.use_beam_search:
            return SamplingType.BEAM
        if self.temperature < SAMPLING_EPS:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED

    @property
    def num_sequences(self) -> int:
        """Sequences that are generated: `best_of`, or the width of the beam."""
        return self.n if self.best_of is None else self.best_of

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def is_plain(self) -> bool:
        """Whether the next token of an answer is the model's likeliest, or drawn from its own logits, whatever the
        answer has so far, and no alternatives are reported. `min_tokens` alone may bar tokens that end it."""
        return (
            not self.use_beam_search
            and not self.logit_bias
            and not self.has_penalties
            and self.structured_outputs is None
            and self.logprobs is None
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def all_stop_token_ids(
        self, eos_token_id: int | None = None, checkpoint_stop_ids: Sequence[int] = ()
    ) -> frozenset[int]:
        """Every token that may not be chosen before `min_tokens`: the request's, and the checkpoint's.

        The checkpoint's count even with `ignore_eos`, as in vLLM.
        """
        eos = () if eos_token_id is None else (eos_token_id,)
        return frozenset([*(self.stop_token_ids or ()), *eos, *checkpoint_stop_ids])

    # -- other ways to make one ------------------------------------------------------------------------------

    def clone(self, **changes: Any) -> SamplingParams:
        """An independent copy, with other values for some fields; checked like a new one."""
        if "n" in changes and "best_of" not in changes and self.best_of == self.n:
            changes["best_of"] = None
        copied: dict[str, Any] = {
            name: list(value)
            for name in ("stop", "stop_token_ids")
            if isinstance(value := getattr(self, name), list)
        }
        if self.logit_bias is not None:
            copied["logit_bias"] = dict(self.logit_bias)
        if self.structured_outputs is not None:
            copied["structured_outputs"] = dict(self.structured_outputs)
        for name in changes:
            checks.known(name, _NAMES)
        return replace(self, **{**copied, **changes})

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """From names and values as files and requests have them. A value of null counts as not given.

        `defaults` stand where `values` says nothing (see `GenerationDefaults.sampling`). Also understood:
        `max_completion_tokens`, `max_new_tokens` (`max_tokens`), `guided_json`, `guided_regex`, `guided_choice`,
        `guided_grammar` (`structured_outputs`).

        Raises:
            InputError: an unknown name (with the nearest known one), a wrong value.
            UnsupportedError: a name of vLLM's that huoyan has not.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"sampling parameters must be names with values, not {type(values).__name__}")
        given = checks.aliases(values)
        for name in given:
            checks.known(name, _NAMES)
        own = {name: value for name, value in given.items() if value is not None or name == "max_tokens"}
        return cls(**{**checks.usable_defaults(own, defaults or {}), **own})

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults; `from_dict` reads them back."""
        empty: dict[str, list[Any]] = {"stop": [], "stop_token_ids": []}
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        if found["best_of"] == self.n:
            del found["best_of"]
        return {
            name: value
            for name, value in found.items()
            if value != _DEFAULTS[name] and value != empty.get(name, _DEFAULTS[name])
        }

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InputError where a token id, or a number of tokens, is beyond the model's vocabulary."""
        for name, ids in (
            ("logit_bias", self.logit_bias or ()),
            ("stop_token_ids", self.stop_token_ids or ()),
        ):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise InputError(
                        f"{name} has token id {token_id}: the vocabulary ends at {vocab_size - 1}"
                    )
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and count > vocab_size:
                raise InputError(f"{name}={count}: the vocabulary has {vocab_size} tokens")


_DEFAULTS = {f.name: f.default for f in fields(SamplingParams)}
_NAMES = tuple(_DEFAULTS)
